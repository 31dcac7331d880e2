"""The relay process: stdio to the agent's socket."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from mlinfra_sdk.errors import LinkError
from mlinfra_sdk.link.client import connect
from mlinfra_sdk.link.frames import Channel
from mlinfra_sdk.link.processes import open_relay
from mlinfra_sdk.link.relay import HANDOVER, MARKER
from mlinfra_sdk.link.server import serve
from mlinfra_sdk.link.session import LinkSession
from mlinfra_sdk.link.state import Timing
from mlinfra_sdk.link.unix import serve_unix
from mlinfra_sdk.link.wire import ProcessWire, Wire

pytestmark = pytest.mark.anyio

SECRET = bytes(range(32))
FAST = Timing(retry_min=0.001, retry_max=0.05)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def echo(session: LinkSession) -> None:
    async for data, stream in session.receive(Channel.BULK):
        await session.send(Channel.BULK, data, stream)


@asynccontextmanager
async def agent(path: Path) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        async with serve(SECRET, echo, timing=FAST) as server:
            tasks.start_soon(serve_unix, path, server.handle)
            while not path.exists():
                await anyio.sleep(0.001)
            yield
        tasks.cancel_scope.cancel()


def relay_command(path: Path) -> list[str]:
    return [sys.executable, "-m", "mlinfra_sdk.link.relay", str(path)]


async def exchange(session: LinkSession, count: int) -> None:
    messages = [random.Random(index).randbytes(1_000_000) for index in range(count)]

    async def send() -> None:
        for index, data in enumerate(messages):
            await session.send(Channel.BULK, data, index)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        index = 0
        async for message in session.receive(Channel.BULK):
            assert message == (messages[index], index)
            index += 1
            if index == count:
                break
        assert index == count


async def test_relay_is_8_bit_clean_and_noise_before_it_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "agent"
    noise = b"Last login: today\n" + MARKER[:-2] + b"\n" + MARKER[:5]
    (tmp_path / "noise").write_bytes(noise)
    command = ["sh", "-c", f'cat {tmp_path}/noise; exec "$@"', "sh", *relay_command(path)]
    async with agent(path), connect(lambda: open_relay(command), SECRET) as session:
        await exchange(session, 20)
        assert session.counters.wires == 1


async def test_a_killed_relay_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "agent"
    wires: list[ProcessWire] = []

    async def factory() -> Wire:
        wire = await open_relay(relay_command(path))
        assert isinstance(wire, ProcessWire)
        wires.append(wire)
        return wire

    async with agent(path), connect(factory, SECRET, timing=FAST) as session:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(exchange, session, 60)
            for killed in range(3):
                while len(wires) == killed or session.counters.wires == killed:
                    await anyio.sleep(0.001)
                os.kill(wires[killed].process.pid, signal.SIGKILL)
        assert session.counters.wires == 4


async def test_a_relay_that_finds_no_agent_says_so(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match=r"no agent answers at .*/nothing: No such file"):
        await open_relay(relay_command(tmp_path / "nothing"))


async def test_a_command_that_prints_without_end_is_given_up() -> None:
    with pytest.raises(LinkError, match="no start marker"):
        await open_relay(["yes"])


async def test_a_command_that_does_not_exist_is_a_link_error() -> None:
    with pytest.raises(LinkError, match="no-such-command"):
        await open_relay(["no-such-command"])


async def test_the_agent_lets_go_of_what_it_was_handed(tmp_path: Path) -> None:
    path = tmp_path / "agent"
    near, far = os.pipe(), os.pipe()
    for fd in (near[0], far[1]):
        os.set_inheritable(fd, True)
    async with agent(path):
        relay = await anyio.open_process(
            relay_command(path), stdin=near[0], stdout=far[1], stderr=None
        )
        os.close(near[0])
        os.close(far[1])
        marker = await anyio.to_thread.run_sync(os.read, far[0], len(MARKER))
        assert marker == MARKER
        os.close(near[1])  # the client is gone
        assert await relay.wait() == 0
        assert await anyio.to_thread.run_sync(os.read, far[0], 1) == b""
        os.close(far[0])


async def test_what_hands_nothing_over_is_turned_away(tmp_path: Path) -> None:
    path = tmp_path / "agent"
    async with agent(path):
        for said in (HANDOVER, b""):
            async with await anyio.connect_unix(path) as stream:
                if said:
                    await stream.send(said)
                else:
                    await stream.send_eof()
                with pytest.raises(anyio.EndOfStream):
                    await stream.receive()
        async with connect(lambda: open_relay(relay_command(path)), SECRET) as session:
            await exchange(session, 1)


def test_a_relay_exits_when_the_agent_falls_silent(tmp_path: Path) -> None:
    code = (
        "import socket, sys; from mlinfra_sdk.link.relay import relay;"
        "a, b = socket.socketpair(); relay(a, 0, 1, quiet_limit=0.2)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.wait(timeout=30) == 0
    process.communicate()
