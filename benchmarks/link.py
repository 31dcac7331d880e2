"""What the link costs: `python benchmarks/link.py`.

Measures against an agent in its own process, over its unix socket and through a relay process:
round trip of a small message (alone, and while bulk data fills the same wire), bulk throughput each
way, rate of journal messages of 500 bytes, resume after a cut, and memory.  Beside them, in the
same run, the raw unix socket: the same bytes by `sendall` and `recv_into` without any protocol.
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import anyio.abc

from mlinfra_sdk.link.client import connect
from mlinfra_sdk.link.frames import Channel
from mlinfra_sdk.link.server import serve
from mlinfra_sdk.link.session import LinkSession
from mlinfra_sdk.link.wire import Wire, connect_unix, open_relay, serve_unix

SECRET = bytes(32)
CHUNK = 4 << 20
JOURNAL_MESSAGES = 100_000
JOURNAL_BYTES = 500


def peak_memory() -> float:
    """Peak resident memory of this process, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


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
                    await session.send(Channel.CONTROL, b"%f" % peak_memory())
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


def report(name: str, value: float, unit: str) -> None:
    print(f"  {name:<44} {value:>9.3f} {unit}")


def report_times(name: str, times: list[float]) -> None:
    report(f"{name}, median", statistics.median(times) * 1e3, "ms")
    report(f"{name}, 99 %", statistics.quantiles(times, n=100)[-1] * 1e3, "ms")


async def measure(factory: Callable[[], Awaitable[Wire]], chunks: int) -> None:
    wires: list[Wire] = []

    async def kept() -> Wire:
        wires.append(await factory())
        return wires[-1]

    amount = chunks * CHUNK / 1e9
    async with connect(kept, SECRET) as session:
        await round_trips(session, 200)
        report_times("round trip of 100 bytes", await round_trips(session, 2000))

        chunk = os.urandom(CHUNK)

        async def upload() -> None:
            for index in range(chunks):
                await session.send(Channel.BULK, chunk, stream=index == chunks - 1)

        start = time.perf_counter()
        await upload()
        await session.receive(Channel.CONTROL).__anext__()
        report("bulk up", amount / (time.perf_counter() - start), "GB/s")

        start = time.perf_counter()
        await session.send(Channel.CONTROL, b"bulk", chunks)
        downloads = session.receive(Channel.BULK)
        for _ in range(chunks):
            await downloads.__anext__()
        report("bulk down", amount / (time.perf_counter() - start), "GB/s")

        async def download() -> None:
            for _ in range(chunks):
                await downloads.__anext__()

        async with anyio.create_task_group() as tasks:
            await session.send(Channel.CONTROL, b"bulk", chunks)
            tasks.start_soon(download)
            times = await round_trips(session, 50)
        report_times("round trip under bulk down", times)

        start = time.perf_counter()
        await session.send(Channel.CONTROL, b"journal", JOURNAL_MESSAGES)
        journal = session.receive(Channel.JOURNAL)
        for _ in range(JOURNAL_MESSAGES):
            await journal.__anext__()
        rate = JOURNAL_MESSAGES / (time.perf_counter() - start)
        report(f"journal, messages of {JOURNAL_BYTES} bytes", rate / 1e3, "thousand/s")

        times = []
        for _ in range(20):
            start = time.perf_counter()
            await wires[-1].aclose()
            await round_trips(session, 1)
            times.append(time.perf_counter() - start)
        report("cut to the next reply, median", statistics.median(times) * 1e3, "ms")

        await session.send(Channel.CONTROL, b"memory")
        memory = float((await session.receive(Channel.CONTROL).__anext__()).data)
        report("peak memory of the client", peak_memory(), "MB")
        report("peak memory of the agent", memory, "MB")


def measure_raw(chunks: int) -> None:
    near, far = socket.socketpair()
    for end in (near, far):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    child = os.fork()
    if not child:
        near.close()
        chunk = os.urandom(CHUNK)
        for _ in range(chunks):
            far.sendall(chunk)
        while data := far.recv(1000):
            far.sendall(data)
        os._exit(0)
    far.close()
    start = time.perf_counter()
    for _ in range(chunks):
        space = memoryview(bytearray(CHUNK))
        while space:
            space = space[near.recv_into(space) :]
    report("bulk", chunks * CHUNK / 1e9 / (time.perf_counter() - start), "GB/s")
    times = []
    for _ in range(2000):
        start = time.perf_counter()
        near.sendall(b"x" * 100)
        near.recv(1000)
        times.append(time.perf_counter() - start)
    report_times("round trip of 100 bytes", times)
    near.close()
    os.waitpid(child, 0)


async def main(chunks: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "agent"
        process = await anyio.open_process(
            [sys.executable, __file__, "--agent", str(path)], stdout=None, stderr=None
        )
        try:
            print("unix socket")
            await measure(lambda: connect_unix(path), chunks)
            print("relay process")
            relay = [sys.executable, "-m", "mlinfra_sdk.link.relay", str(path)]
            await measure(lambda: open_relay(relay), chunks)
        finally:
            process.kill()
            await process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=256, help="bulk messages of 4 MiB")
    parser.add_argument("--agent", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.agent:
        anyio.run(agent, arguments.agent)
    else:
        print("raw unix socket, no protocol")
        measure_raw(arguments.chunks)
        anyio.run(main, arguments.chunks)
