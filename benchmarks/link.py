"""What the link costs: `python -m benchmarks link`.

Against an agent in its own process, over its unix socket and through a relay process: round trip of
a small message (alone, and while bulk data fills the same wire), bulk throughput each way, rate of
journal messages of 500 bytes, resume after a cut, and memory. Beside them, in the same run, the raw
unix socket: the same bytes by ``sendall`` and ``recv_into`` without any protocol.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import anyio.abc

from benchmarks.harness import Figure, median, peak_memory, reset_peak, say
from mlinfra_sdk.link.client import connect
from mlinfra_sdk.link.frames import Channel
from mlinfra_sdk.link.processes import open_relay
from mlinfra_sdk.link.server import serve
from mlinfra_sdk.link.session import LinkSession
from mlinfra_sdk.link.unix import connect_unix, serve_unix
from mlinfra_sdk.link.wire import Wire

Measured = dict[str, float]

SECRET = bytes(32)
CHUNK = 4 << 20
CHUNKS = 256
JOURNAL_MESSAGES = 100_000
JOURNAL_BYTES = 500


async def agent(path: Path) -> None:
    """Echoes control; takes bulk and says when it has `stream` bytes; sends bulk or journal."""

    async def on_session(session: LinkSession) -> None:
        async def send(channel: Channel, size: int, count: int) -> None:
            data = os.urandom(size)
            for _ in range(count):
                await session.send(channel, data)

        async def control() -> None:
            async for data, amount in session.receive(Channel.CONTROL):
                if data == b"bulk":
                    tasks.start_soon(send, Channel.BULK, CHUNK, amount)
                elif data == b"journal":
                    tasks.start_soon(send, Channel.JOURNAL, JOURNAL_BYTES, amount)
                elif data == b"memory":
                    await session.send(Channel.CONTROL, b"%f" % (peak_memory(os.getpid()) / 1e6))
                else:
                    await session.send(Channel.CONTROL, data)

        async def bulk() -> None:
            async for _, last in session.receive(Channel.BULK):
                if last:
                    await session.send(Channel.CONTROL, b"got it")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(control)
            tasks.start_soon(bulk)

    async with serve(SECRET, on_session) as server:
        await serve_unix(path, server.handle)


async def round_trips(session: LinkSession, count: int) -> list[float]:
    replies = session.receive(Channel.CONTROL)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        await session.send(Channel.CONTROL, b"x" * 100)
        await replies.__anext__()
        times.append(time.perf_counter() - start)
    return times


async def measure(factory: Callable[[], Awaitable[Wire]]) -> Measured:
    """What a wire of this kind gives."""
    wires: list[Wire] = []
    found: Measured = {}

    async def kept() -> Wire:
        wires.append(await factory())
        return wires[-1]

    reset_peak(os.getpid())  # of benchmarks that ran before in this process
    amount = CHUNKS * CHUNK / 1e9
    async with connect(kept, SECRET) as session:
        await round_trips(session, 200)
        found["round trip"] = median(await round_trips(session, 2000)) * 1e3

        chunk = os.urandom(CHUNK)

        async def upload() -> None:
            for index in range(CHUNKS):
                await session.send(Channel.BULK, chunk, stream=index == CHUNKS - 1)

        start = time.perf_counter()
        await upload()
        await session.receive(Channel.CONTROL).__anext__()
        found["bulk up"] = amount / (time.perf_counter() - start)

        start = time.perf_counter()
        await session.send(Channel.CONTROL, b"bulk", CHUNKS)
        downloads = session.receive(Channel.BULK)
        for _ in range(CHUNKS):
            await downloads.__anext__()
        found["bulk down"] = amount / (time.perf_counter() - start)

        async def download() -> None:
            for _ in range(CHUNKS):
                await downloads.__anext__()

        async with anyio.create_task_group() as tasks:
            await session.send(Channel.CONTROL, b"bulk", CHUNKS)
            tasks.start_soon(download)
            times = await round_trips(session, 50)
        found["round trip under bulk"] = median(times) * 1e3

        start = time.perf_counter()
        await session.send(Channel.CONTROL, b"journal", JOURNAL_MESSAGES)
        journal = session.receive(Channel.JOURNAL)
        for _ in range(JOURNAL_MESSAGES):
            await journal.__anext__()
        found["journal"] = JOURNAL_MESSAGES / 1e3 / (time.perf_counter() - start)

        times = []
        for _ in range(20):
            start = time.perf_counter()
            await wires[-1].aclose()
            await round_trips(session, 1)
            times.append(time.perf_counter() - start)
        found["cut"] = median(times) * 1e3

        await session.send(Channel.CONTROL, b"memory")
        found["agent"] = float((await session.receive(Channel.CONTROL).__anext__()).data)
        found["client"] = peak_memory(os.getpid()) / 1e6
    return found


def measure_raw() -> Measured:
    """The same bytes over a socket pair."""
    found: Measured = {}
    near, far = socket.socketpair()
    for end in (near, far):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    child = os.fork()
    if not child:
        near.close()
        chunk = os.urandom(CHUNK)
        for _ in range(CHUNKS):
            far.sendall(chunk)
        while data := far.recv(1000):
            far.sendall(data)
        os._exit(0)
    far.close()
    start = time.perf_counter()
    for _ in range(CHUNKS):
        space = memoryview(bytearray(CHUNK))
        while space:
            space = space[near.recv_into(space) :]
    found["bulk up"] = found["bulk down"] = CHUNKS * CHUNK / 1e9 / (time.perf_counter() - start)
    times = []
    for _ in range(2000):
        start = time.perf_counter()
        near.sendall(b"x" * 100)
        near.recv(1000)
        times.append(time.perf_counter() - start)
    found["round trip"] = found["round trip under bulk"] = median(times) * 1e3
    near.close()
    os.waitpid(child, 0)
    return found


TABLE = (
    ("round trip", "round trip of 100 bytes", "ms"),
    ("round trip under bulk", "the same while bulk data comes", "ms"),
    ("bulk up", "bulk up", "GB/s"),
    ("bulk down", "bulk down", "GB/s"),
    ("journal", f"journal messages of {JOURNAL_BYTES} bytes", "thousand/s"),
    ("cut", "cut to the next reply", "ms"),
    ("client", "peak memory of the client", "MB"),
    ("agent", "peak memory of the agent", "MB"),
)


def main() -> list[Figure]:
    """All figures of this module."""
    say("raw socket")
    raw = measure_raw()
    return anyio.run(_main, raw)


async def _main(raw: Measured) -> list[Figure]:
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "agent"
        process = await anyio.open_process(
            [sys.executable, "-m", "benchmarks.link", str(path)], stdout=None, stderr=None
        )
        relay = [sys.executable, "-m", "mlinfra_sdk.link.relay", str(path)]
        wires: dict[str, Callable[[], Awaitable[Wire]]] = {
            "unix socket": lambda: connect_unix(path),
            "relay process": lambda: open_relay(relay),
        }
        try:
            for wire, factory in wires.items():
                say(wire)
                found = await measure(factory)
                figures += [
                    Figure(
                        f"{what}, {wire}",
                        found[key],
                        unit,
                        {"raw socket": raw[key]} if key in raw else {},
                    )
                    for key, what, unit in TABLE
                ]
        finally:
            process.kill()
            await process.wait()
    return figures


if __name__ == "__main__":
    anyio.run(agent, Path(sys.argv[1]))
