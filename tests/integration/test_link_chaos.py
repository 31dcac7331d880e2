"""Nothing is lost, doubled or reordered, whatever happens to the wire at whichever byte.

``MLINFRA_CHAOS_SEEDS=200`` runs more seeds than the quick ones.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from chaos import ChaosProxy, Plan, random_cuts

from mlinfra_sdk.link.client import connect
from mlinfra_sdk.link.frames import Channel
from mlinfra_sdk.link.server import serve
from mlinfra_sdk.link.session import LinkSession
from mlinfra_sdk.link.state import State, Status, Timing
from mlinfra_sdk.link.unix import connect_unix, serve_unix

pytestmark = pytest.mark.anyio

SEEDS = range(int(os.environ.get("MLINFRA_CHAOS_SEEDS", "6")))
SECRET = bytes(range(32))
FAST = Timing(retry_min=0.001, retry_max=0.02)
CONTENT = random.Random(0).randbytes(4 << 20)

COUNTS = {
    Channel.CONTROL: 400,
    Channel.JOURNAL: 1500,
    Channel.METRICS: 300,
    Channel.FORWARD: 200,
    Channel.BULK: 24,
}
LARGEST = {
    Channel.CONTROL: 2_000,
    Channel.JOURNAL: 600_000,
    Channel.METRICS: 1_000,
    Channel.FORWARD: 300_000,
    Channel.BULK: 3_500_000,
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def message(seed: int, channel: Channel, index: int) -> tuple[bytes, int]:
    """The content and stream of a message, the same on both sides."""
    source = random.Random(f"{seed} {channel} {index}")
    size = int((LARGEST[channel] + 1) ** source.random()) - 1
    if channel is Channel.BULK:
        size = source.randrange(LARGEST[channel])
    start = source.randrange(len(CONTENT) - size)
    return CONTENT[start : start + size], source.randrange(1 << 32)


async def talk(session: LinkSession, sent: int, expected: int) -> None:
    """Send the messages of seed ``sent`` on every channel, and check those of ``expected``."""

    async def send(channel: Channel) -> None:
        for index in range(COUNTS[channel]):
            await session.send(channel, *message(sent, channel, index))

    async def check(channel: Channel) -> None:
        index = 0
        async for data, stream in session.receive(channel):
            assert (data, stream) == message(expected, channel, index), (channel, index)
            index += 1
            if index == COUNTS[channel]:
                break
        assert index == COUNTS[channel]

    async with anyio.create_task_group() as tasks:
        for channel in Channel:
            tasks.start_soon(send, channel)
            tasks.start_soon(check, channel)
    await session.flush()
    for channel in Channel:
        assert session.receive_nowait(channel) is None, "a message came twice"


@asynccontextmanager
async def world(
    folder: Path,
    plan: Callable[[int], Plan],
    on_session: Callable[[LinkSession], object],
    timing: Timing = FAST,
) -> AsyncIterator[ChaosProxy]:
    """An agent's link server behind a chaos proxy."""
    proxy = ChaosProxy(folder / "proxy", folder / "agent", plan)
    async with anyio.create_task_group() as tasks:
        async with serve(SECRET, on_session, timing=timing) as server:
            tasks.start_soon(serve_unix, proxy.target, server.handle)
            tasks.start_soon(proxy.run)
            yield proxy
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("seed", SEEDS)
async def test_random_cuts(tmp_path: Path, seed: int) -> None:
    finished = anyio.Event()

    async def on_session(session: LinkSession) -> None:
        await talk(session, sent=seed + 1000, expected=seed)
        finished.set()
        await session.wait_closed()

    plan = random_cuts(seed, count=40, longest=8 << 20)
    async with world(tmp_path, plan, on_session) as proxy:
        states: list[Status] = []
        async with connect(
            lambda: connect_unix(proxy.path), SECRET, timing=FAST, on_status=states.append
        ) as session:
            await talk(session, sent=seed, expected=seed + 1000)
            await finished.wait()
            wires = session.counters.wires
    assert proxy.cuts >= 5, "too few cuts to mean anything"
    assert [status.state for status in states] == [
        *[State.CONNECTED, State.RECONNECTING] * (wires - 1),
        State.CONNECTED,
        State.CLOSED,
    ]


@pytest.mark.parametrize("seed", SEEDS[:3])
async def test_half_open_connections(tmp_path: Path, seed: int) -> None:
    """Connections that fall silent without an end, in the handshake or later."""
    timing = Timing(heartbeat=0.05, dead_after=0.3, handshake=0.3, retry_min=0.001, retry_max=0.02)
    finished = anyio.Event()

    async def on_session(session: LinkSession) -> None:
        await talk(session, sent=seed + 1000, expected=seed)
        finished.set()
        await session.wait_closed()

    source = random.Random(seed)
    lengths = [int(2_000_000 ** source.random()) for _ in range(6)]

    def plan(number: int) -> Plan:
        if number >= len(lengths):
            return Plan()
        return Plan(cut=(lengths[number], lengths[number]), half_open=True)

    async with (
        world(tmp_path, plan, on_session, timing) as proxy,
        connect(lambda: connect_unix(proxy.path), SECRET, timing=timing) as session,
    ):
        await talk(session, sent=seed, expected=seed + 1000)
        await finished.wait()
    assert proxy.connections > len(lengths)


async def test_urgent_messages_pass_a_slow_uplink_that_is_full(tmp_path: Path) -> None:
    """4 MB over 2 MB/s: the wire is not taken for dead, and no urgent message waits behind it."""
    timing = Timing(heartbeat=0.1, dead_after=1)
    order: list[Channel] = []

    async def on_session(session: LinkSession) -> None:
        async def note(channel: Channel) -> None:
            async for _ in session.receive(channel):
                order.append(channel)
                await session.send(channel, b"")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(note, Channel.CONTROL)
            tasks.start_soon(note, Channel.BULK)

    async with (
        world(tmp_path, lambda _: Plan(rate=2e6), on_session, timing) as proxy,
        connect(lambda: connect_unix(proxy.path), SECRET, timing=timing) as session,
    ):
        await session.send(Channel.BULK, CONTENT)
        for _ in range(3):
            await session.send(Channel.CONTROL, b"interrupt")
            async for _ in session.receive(Channel.CONTROL):
                break
        async for _ in session.receive(Channel.BULK):
            break
        assert session.counters.wires == 1
    assert order == [*[Channel.CONTROL] * 3, Channel.BULK]
