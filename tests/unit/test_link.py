"""Sessions over wires inside one process."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlinfra_sdk.errors import AuthenticationError, LinkClosed, LinkError, VersionMismatch
from mlinfra_sdk.link import client as client_module
from mlinfra_sdk.link import handshake
from mlinfra_sdk.link.client import connect
from mlinfra_sdk.link.flow import OVERHEAD, WINDOWS, Message
from mlinfra_sdk.link.frames import (
    MAX_MESSAGE,
    Buffer,
    Channel,
    Decoder,
    Kind,
    encode,
    encode_frame,
)
from mlinfra_sdk.link.server import LinkServer, serve
from mlinfra_sdk.link.session import LinkSession
from mlinfra_sdk.link.state import State, Status, Timing
from mlinfra_sdk.link.unix import connect_unix, serve_unix
from mlinfra_sdk.link.wire import SocketWire, StreamWire, Wire

pytestmark = pytest.mark.anyio

SECRET = bytes(range(32))
FAST = Timing(retry_min=0.001, retry_max=0.01, ack_delay=0.001)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class World:
    """A server and a factory of wires to it; `cut` closes the newest wire's server end."""

    def __init__(self, server: LinkServer, tasks: anyio.abc.TaskGroup) -> None:
        self.server = server
        self.tasks = tasks
        self.wires: list[SocketWire] = []
        self.reachable = True

    async def factory(self) -> Wire:
        if not self.reachable:
            raise LinkError("no way there")
        near, far = socket.socketpair()
        wire = SocketWire(far)
        self.wires.append(wire)
        self.tasks.start_soon(self.server.handle, wire)
        return SocketWire(near)

    async def cut(self) -> None:
        await self.wires[-1].aclose()


async def echo(session: LinkSession) -> None:
    async for data, stream in session.receive(Channel.CONTROL):
        await session.send(Channel.CONTROL, data, stream)


@asynccontextmanager
async def world(
    on_session: Callable[[LinkSession], Awaitable[None]] = echo,
    timing: Timing = FAST,
    windows: dict[Channel, int] = WINDOWS,
    **facts: object,
) -> AsyncIterator[World]:
    async with anyio.create_task_group() as tasks:
        async with serve(SECRET, on_session, timing=timing, windows=windows, **facts) as server:
            yield World(server, tasks)
        tasks.cancel_scope.cancel()


async def take(session: LinkSession, channel: Channel = Channel.CONTROL) -> Message:
    async for message in session.receive(channel):
        return message
    raise AssertionError("the session ended")


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not condition():
            await anyio.sleep(0.001)


async def test_messages_pass_both_ways() -> None:
    async with world() as here, connect(here.factory, SECRET, timing=FAST) as session:
        for data in (b"", b"x", bytearray(b"writable"), memoryview(bytes(1 << 20))):
            await session.send(Channel.CONTROL, data, stream=2**32 - 1)
            assert await take(session) == (data, 2**32 - 1)


async def test_a_writable_buffer_may_be_changed_after_send() -> None:
    async with world() as here, connect(here.factory, SECRET, timing=FAST) as session:
        buffer = bytearray(b"before")
        await session.send(Channel.CONTROL, buffer)
        buffer[:] = b"after."
        assert (await take(session)).data == b"before"


async def test_facts_and_features_are_exchanged() -> None:
    sessions: list[LinkSession] = []

    async def on_session(session: LinkSession) -> None:
        sessions.append(session)
        await session.wait_closed()

    async with world(on_session, features=["a", "b"], info={"python": "3.10"}) as here:
        options = {"features": ["b", "c"], "info": {"python": "3.13"}}
        async with connect(here.factory, SECRET, timing=FAST, **options) as session:
            assert session.peer is not None
            assert session.peer.info == {"python": "3.10"}
            assert session.peer.features == {"b"}
            await until(lambda: bool(sessions))
            assert sessions[0].peer is not None
            assert sessions[0].peer.info == {"python": "3.13"}
            assert sessions[0].peer.features == {"b"}


async def test_a_cut_is_mended_and_reported() -> None:
    states: list[Status] = []
    async with (
        world() as here,
        connect(here.factory, SECRET, timing=FAST, on_status=states.append) as session,
    ):
        await session.send(Channel.CONTROL, b"1")
        await take(session)
        await here.cut()
        await until(lambda: session.status.state is State.RECONNECTING)
        assert session.status.error is not None
        await session.send(Channel.CONTROL, b"2")
        assert (await take(session)).data == b"2"
        assert len(here.server.sessions) == 1
    names = [status.state.value for status in states]
    assert names == ["connected", "reconnecting", "connected", "closed"]


class Deaf(SocketWire):
    """A wire that does not notice its end, like one whose network is gone."""

    async def receive_into(self, space: memoryview, *, fill: bool = False) -> int:
        count = await super().receive_into(space, fill=fill)
        if not count:
            await anyio.sleep_forever()
        return count


async def test_a_newer_wire_takes_over_from_a_stale_one() -> None:
    async with world() as here:
        clients: list[SocketWire] = []

        async def factory() -> Wire:
            near, far = socket.socketpair()
            here.tasks.start_soon(here.server.handle, Deaf(far))
            clients.append(SocketWire(near))
            return clients[-1]

        async with connect(factory, SECRET, timing=FAST) as session:
            for index in range(5):
                await session.send(Channel.CONTROL, b"%d" % index)
                assert (await take(session)).data == b"%d" % index
                await clients[-1].aclose()
            await session.send(Channel.CONTROL, b"end")
            assert (await take(session)).data == b"end"
            assert session.counters.wires == 6


async def test_two_clients_have_their_own_sessions() -> None:
    async with (
        world() as here,
        connect(here.factory, SECRET, timing=FAST) as one,
        connect(here.factory, SECRET, timing=FAST) as two,
    ):
        await one.send(Channel.CONTROL, b"one")
        await two.send(Channel.CONTROL, b"two")
        assert (await take(two)).data == b"two"
        assert (await take(one)).data == b"one"
        assert len(here.server.sessions) == 2


async def test_leaving_the_block_ends_the_session_on_both_sides() -> None:
    received: list[bytes] = []
    ended = anyio.Event()

    async def on_session(session: LinkSession) -> None:
        async for data, _ in session.receive(Channel.JOURNAL):
            received.append(bytes(data))
        ended.set()

    async with world(on_session) as here:
        async with connect(here.factory, SECRET, timing=FAST) as session:
            for index in range(1000):
                await session.send(Channel.JOURNAL, b"%d" % index)
        assert session.status.state is State.CLOSED
        await ended.wait()
        assert received == [b"%d" % index for index in range(1000)]
        await until(lambda: not here.server.sessions)
        with pytest.raises(LinkClosed):
            await session.send(Channel.CONTROL, b"late")
        with pytest.raises(LinkClosed):
            session.send_nowait(Channel.CONTROL, b"late")
        assert [message async for message in session.receive(Channel.CONTROL)] == []


async def test_an_error_in_the_block_comes_out_as_it_is() -> None:
    async with world() as here:
        with pytest.raises(KeyError, match="mine"):
            async with connect(here.factory, SECRET, timing=FAST):
                raise KeyError("mine")


async def test_the_server_can_end_a_session() -> None:
    async def on_session(session: LinkSession) -> None:
        await session.send(Channel.CONTROL, b"last words")

    async with world(on_session) as here, connect(here.factory, SECRET, timing=FAST) as session:
        received = [message.data async for message in session.receive(Channel.CONTROL)]
        assert received == [b"last words"]
        assert session.status == Status(State.CLOSED, session.status.since)


async def test_a_failing_application_ends_its_session_only() -> None:
    async def on_session(session: LinkSession) -> None:
        if (await take(session)).data == b"fail":
            raise RuntimeError("bug")
        await echo(session)

    async with world(on_session) as here, connect(here.factory, SECRET, timing=FAST) as other:
        async with connect(here.factory, SECRET, timing=FAST) as session:
            await session.send(Channel.CONTROL, b"fail")
            with pytest.raises(LinkClosed, match="log"):
                await take(session)
        await other.send(Channel.CONTROL, b"go")
        await other.send(Channel.CONTROL, b"on")
        assert (await take(other)).data == b"on"


async def test_a_wrong_secret_is_refused_on_both_sides() -> None:
    async with world() as here:
        with pytest.raises(AuthenticationError):
            async with connect(here.factory, bytes(32), timing=FAST):
                pass
        assert here.server.sessions == []

        # A client that does not check the agent's proof is refused by the agent.
        near, far = socket.socketpair()
        here.tasks.start_soon(here.server.handle, SocketWire(far))
        wire = SocketWire(near)
        await wire.send([hello_frame()])
        await handshake.receive_frame(wire, decoder := Decoder(), Kind.WELCOME)
        await wire.send([encode_frame(Kind.AUTH, bytes(32) + b"\x80")])
        with pytest.raises(AuthenticationError):
            await handshake.receive_frame(wire, decoder, Kind.READY)
        assert here.server.sessions == []
        await wire.aclose()


def hello_frame(session: bytes = bytes(16), attempt: int = 1) -> bytes:
    hello = handshake.Hello(
        versions=handshake.VERSIONS,
        session=session,
        attempt=attempt,
        resume=False,
        nonce=bytes(32),
        windows=list(WINDOWS.values()),
        features=[],
        info={},
    )
    return encode_frame(Kind.HELLO, handshake.msgspec.msgpack.encode(hello))


async def test_no_common_version_is_said_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    async def newer(*args: object, **options: object) -> object:
        return await handshake.approach(*args, **options, versions=(7, 9))  # type: ignore[arg-type]

    monkeypatch.setattr(client_module, "approach", newer)
    async with world() as here:
        with pytest.raises(VersionMismatch, match=r"7 to 9.*speaks 1\."):
            async with connect(here.factory, SECRET, timing=FAST):
                pass


class Recorder:
    """A wire that keeps what is sent over another one."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.sent = bytearray()
        self.receive_into = wire.receive_into
        self.aclose = wire.aclose

    async def send(self, buffers: list[bytes]) -> None:
        self.sent += b"".join(buffers)
        await self.wire.send(buffers)


async def test_a_replayed_connection_is_refused() -> None:
    async with world() as here:
        recorders: list[Recorder] = []

        async def factory() -> Wire:
            recorders.append(Recorder(await here.factory()))
            return recorders[-1]

        async with connect(factory, SECRET, timing=FAST) as session:
            await session.send(Channel.CONTROL, b"pay")
            await take(session)
            replay = await here.factory()
            await replay.send([bytes(recorders[0].sent)])
            with pytest.raises(AuthenticationError):
                await handshake.receive_frame(replay, decoder := Decoder(), Kind.WELCOME)
                await handshake.receive_frame(replay, decoder, Kind.READY)
            await replay.aclose()
            await session.send(Channel.CONTROL, b"again")
            assert (await take(session)).data == b"again"
            assert session.counters.wires == 1


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(min_size=1, max_size=300), st.booleans())
def test_garbage_closes_its_wire_and_nothing_else(noise: bytes, after_hello: bool) -> None:
    async def main() -> None:
        async with world() as here, connect(here.factory, SECRET, timing=FAST) as session:
            wire = await here.factory()
            await wire.send([hello_frame(), noise] if after_hello else [noise])
            space = memoryview(bytearray(1 << 16))
            if not after_hello and len(noise) < 32:
                await wire.aclose()
            else:
                with anyio.fail_after(10):
                    while await wire.receive_into(space):
                        pass
                await wire.aclose()
            await session.send(Channel.CONTROL, b"alive")
            assert (await take(session)).data == b"alive"

    if after_hello and len(noise) < 32:
        noise = noise + bytes(32 - len(noise))
    anyio.run(main)


async def test_garbage_in_the_middle_is_survived() -> None:
    """Something else prints into the stream: the wire is given up, no message is harmed."""
    async with world() as here, connect(here.factory, SECRET, timing=FAST) as session:
        for index in range(20):
            await until(lambda: session.status.state is State.CONNECTED)
            os.write(here.wires[-1]._write_fd, b"Welcome to Ubuntu\n" * 3)
            await session.send(Channel.CONTROL, b"%d" % index)
            assert (await take(session)).data == b"%d" % index
        assert session.counters.wires >= 2


async def test_data_beyond_the_window_ends_the_wire() -> None:
    async def on_session(session: LinkSession) -> None:
        await session.wait_closed()

    async with world(on_session) as here:
        near, far = socket.socketpair()
        here.tasks.start_soon(here.server.handle, SocketWire(far))
        wire = SocketWire(near)
        decoder, _, _ = await handshake.approach(
            wire,
            SECRET,
            session=bytes(16),
            attempt=1,
            resume=handshake.Resume(0, [0] * 5),
            resuming=False,
            windows=list(WINDOWS.values()),
            features=[],
            info={},
        )
        payload = bytes(200_000)
        with pytest.raises(LinkError):  # at the latest when the wire is closed
            for number in range(1, 100):
                header = encode(Kind.DATA, payload, number=number, size=len(payload))
                await wire.send([header, payload])
        (session,) = here.server.sessions
        assert len(session._inboxes[0].ready) * (len(payload) + OVERHEAD) <= WINDOWS[0]
        await wire.aclose()
        assert decoder is not None


@pytest.mark.parametrize("channel", list(Channel))
async def test_a_slow_consumer_bounds_memory_on_both_sides(channel: Channel) -> None:
    go = anyio.Event()
    received: list[int] = []
    servers: list[LinkSession] = []

    async def on_session(session: LinkSession) -> None:
        servers.append(session)
        await go.wait()
        async for data, stream in session.receive(channel):
            assert len(data) == 100_000
            received.append(stream)

    async with world(on_session) as here, connect(here.factory, SECRET, timing=FAST) as session:
        data = bytes(100_000)
        sent = 0
        while True:
            while session.send_nowait(channel, data, sent):
                sent += 1
            await session.flush()  # all that was admitted has arrived over there ...
            if not session.send_nowait(channel, data, sent):
                break  # ... and yet there is no room
            sent += 1
        most = WINDOWS[channel] // (len(data) + OVERHEAD)
        assert most - 2 <= sent <= most + 1  # fragments may be consumed before their message
        assert len(servers[0]._inboxes[channel].ready) == sent

        # Another channel still passes.
        other = Channel.METRICS if channel is not Channel.METRICS else Channel.JOURNAL
        await session.send(other, b"passes")
        await until(lambda: servers[0].receive_nowait(other) is not None)

        async with anyio.create_task_group() as tasks:
            for index in range(sent, sent + 50):  # waiting senders get room in their order
                tasks.start_soon(session.send, channel, data, index)
            await anyio.lowlevel.checkpoint()
            go.set()
        await until(lambda: len(received) == sent + 50)
        assert received == list(range(sent + 50))


async def test_messages_larger_than_the_window_pass() -> None:
    small = dict.fromkeys(Channel, 100_000)
    async with (
        world(windows=small) as here,
        connect(here.factory, SECRET, timing=FAST, windows=small) as session,
    ):
        data = random.Random(1).randbytes(3_000_000)
        async with anyio.create_task_group() as tasks:
            for index in range(3):
                tasks.start_soon(session.send, Channel.CONTROL, data, index)
            for index in range(3):
                assert await take(session) == (data, index)
        with pytest.raises(ValueError, match="64 MiB"):
            await session.send(Channel.CONTROL, bytes(MAX_MESSAGE + 1))


async def test_urgent_messages_overtake_bulk() -> None:
    order: list[Channel] = []

    async def on_session(session: LinkSession) -> None:
        async def note(channel: Channel) -> None:
            async for _ in session.receive(channel):
                order.append(channel)

        async with anyio.create_task_group() as tasks:
            for channel in Channel:
                tasks.start_soon(note, channel)

    async with world(on_session) as here, connect(here.factory, SECRET, timing=FAST) as session:
        here.reachable = False
        await here.cut()
        await until(lambda: session.status.state is State.RECONNECTING)
        for channel in reversed(Channel):
            await session.send(channel, bytes(1_000_000 if channel is Channel.BULK else 10))
        here.reachable = True
        await until(lambda: len(order) == len(Channel))
        assert order == list(Channel)


async def test_senders_wait_while_there_is_no_connection() -> None:
    async with world() as here, connect(here.factory, SECRET, timing=FAST) as session:
        here.reachable = False
        await here.cut()
        await until(lambda: session.status.state is State.RECONNECTING)
        count = 0
        while session.send_nowait(Channel.CONTROL, bytes(10_000), count):
            count += 1
        assert count == WINDOWS[Channel.CONTROL] // (10_000 + OVERHEAD)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(session.send, Channel.CONTROL, b"more", count)
            here.reachable = True
            for index in range(count + 1):
                assert (await take(session)).stream == index


async def test_a_client_gives_up_in_the_end() -> None:
    timing = Timing(retry_min=0.001, retry_max=0.01, give_up=0.05)
    async with world() as here, connect(here.factory, SECRET, timing=timing) as session:
        here.reachable = False
        await here.cut()
        with pytest.raises(LinkClosed, match="no way there"):
            await take(session)
        with pytest.raises(LinkClosed, match="no way there"):
            await session.send(Channel.CONTROL, b"")
        with pytest.raises(LinkClosed):
            await session.flush()
        assert session.status.state is State.CLOSED


async def test_the_first_connection_waits_for_the_agent_but_not_for_ever() -> None:
    async with world() as here:
        here.reachable = False
        with pytest.raises(LinkClosed, match="no way there"):
            async with connect(here.factory, SECRET, timing=FAST, connect_within=0.02):
                pass
        async with anyio.create_task_group() as tasks:

            async def appear() -> None:
                here.reachable = True

            tasks.start_soon(appear)
            async with connect(here.factory, SECRET, timing=FAST) as session:
                assert session.status.state is State.CONNECTED


async def test_a_session_whose_client_stays_away_is_dropped() -> None:
    timing = Timing(retry_min=0.001, retry_max=0.01, retention=0.05)
    ended: list[str] = []

    async def on_session(session: LinkSession) -> None:
        try:
            await take(session)
        except LinkClosed as error:
            ended.append(str(error))
            raise

    async with (
        world(on_session, timing) as here,
        connect(here.factory, SECRET, timing=FAST) as session,
    ):
        here.reachable = False
        await here.cut()
        await until(lambda: not here.server.sessions)
        assert ended and "away" in ended[0]
        here.reachable = True
        with pytest.raises(LinkClosed, match="does not know this session"):
            await take(session)


async def test_an_agent_that_was_started_anew_does_not_know_the_session() -> None:
    async with (
        world() as first,
        world() as second,
        connect(first.factory, SECRET, timing=FAST) as session,
    ):
        first.server = second.server
        await first.cut()
        with pytest.raises(LinkClosed, match="does not know this session"):
            await take(session)


async def test_a_late_attempt_does_not_take_over() -> None:
    async with world() as here, connect(here.factory, SECRET, timing=FAST) as session:
        await session.send(Channel.CONTROL, b"1")
        await take(session)
        wire = await here.factory()
        with pytest.raises(LinkError):
            await handshake.approach(
                wire,
                SECRET,
                session=session.id,
                attempt=1,
                resume=handshake.Resume(0, [0] * 5),
                resuming=True,
                windows=list(WINDOWS.values()),
                features=[],
                info={},
            )
        await wire.aclose()
        await session.send(Channel.CONTROL, b"2")
        assert (await take(session)).data == b"2"
        assert session.counters.wires == 1


class Mutable(SocketWire):
    """A wire that can fall silent both ways without an end."""

    muted = False

    async def send(self, buffers: Sequence[Buffer]) -> None:
        if not self.muted:
            await super().send(buffers)

    async def receive_into(self, space: memoryview, *, fill: bool = False) -> int:
        count = await super().receive_into(space, fill=fill)
        if self.muted:
            await anyio.sleep_forever()
        return count


async def test_a_silent_peer_is_found_dead_and_a_pinging_one_is_not() -> None:
    timing = Timing(heartbeat=0.05, dead_after=0.5, retry_min=0.001, retry_max=0.01)
    async with world(timing=timing) as here:
        clients: list[Mutable] = []

        async def factory() -> Wire:
            near, far = socket.socketpair()
            here.tasks.start_soon(here.server.handle, Mutable(far))
            clients.append(Mutable(near))
            return clients[-1]

        async with connect(factory, SECRET, timing=timing) as session:
            # A ping and a pong of 32 bytes each arrive with every beat.
            pinged = 64 * 4 * timing.dead_after / timing.heartbeat
            await until(lambda: session.counters.bytes_received > pinged)
            assert session.counters.round_trip > 0
            assert session.counters.wires == 1
            clients[0].muted = True
            await until(lambda: session.counters.wires == 2)
            await session.send(Channel.CONTROL, b"x")
            assert (await take(session)).data == b"x"


async def test_any_anyio_stream_is_a_wire(tmp_path: Path) -> None:
    path = tmp_path / "agent"

    async def factory() -> Wire:
        stream = await anyio.connect_unix(path)
        return StreamWire(stream, stream)

    async with world() as here:
        here.tasks.start_soon(serve_unix, path, here.server.handle)
        await until(path.exists)
        async with connect(factory, SECRET, timing=FAST) as session:
            await session.send(Channel.CONTROL, bytes(300_000))
            assert (await take(session)).data == bytes(300_000)


async def test_unix_sockets_are_private_replace_stale_ones_and_may_have_long_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ("long" * 40) / "agent"
    path.parent.mkdir()
    for _ in range(2):
        async with world() as here:
            here.tasks.start_soon(serve_unix, path, here.server.handle)
            async with connect(lambda: connect_unix(path), SECRET, timing=FAST) as session:
                assert path.stat().st_mode & 0o777 == 0o600
                await session.send(Channel.CONTROL, b"x")
                assert (await take(session)).data == b"x"
        assert not path.exists()
        with pytest.raises(LinkError, match="No agent answers"):
            await connect_unix(path)
        stale = socket.socket(socket.AF_UNIX)
        monkeypatch.chdir(path.parent)
        stale.bind("agent")
        stale.close()
