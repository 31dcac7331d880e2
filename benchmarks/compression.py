"""Adaptive compression on a slow link: `python -m benchmarks compression`.

Chunks from one store to another through a proxy that lets through so many bytes per second; once
as it is, and once to a side that does not know compression. Text shrinks, random bytes do not.
"""

from __future__ import annotations

import io
import itertools
import os
import random
import tempfile
import time
from pathlib import Path

import anyio
from chaos import ChaosProxy, Plan

from benchmarks.harness import Figure, median, say
from mlinfra_sdk.link.client import connect
from mlinfra_sdk.link.server import serve
from mlinfra_sdk.link.session import LinkSession
from mlinfra_sdk.link.unix import connect_unix, serve_unix
from mlinfra_sdk.objects.bulk import Bulk
from mlinfra_sdk.objects.compression import FEATURE
from mlinfra_sdk.objects.store import CHUNK_SIZE, ChunkStore

ROUNDS = 3
SECRET = bytes(32)
CASES = ((10e6, 8), (40e6, 16))
"""Bytes per second of the link, and how many chunks of 4 MiB go over it."""


def main() -> list[Figure]:
    """All figures of this module."""
    return anyio.run(_main)


async def _main() -> list[Figure]:
    figures = []
    for rate, count in CASES:
        for kind, make in (("text", _text), ("random bytes", os.urandom)):
            say(f"{kind} at {rate / 1e6:.0f} MB/s")
            chunks = [make(CHUNK_SIZE) for _ in range(count)]
            seconds: dict[str, list[float]] = {"ours": [], "never compressed": []}
            for _ in range(ROUNDS):
                for name, features in (("ours", [FEATURE]), ("never compressed", [])):
                    seconds[name].append(await _move(chunks, rate, features))
            ours, plain = median(seconds["ours"]), median(seconds["never compressed"])
            figures.append(
                Figure(
                    f"{count * CHUNK_SIZE >> 20} MiB of {kind} at {rate / 1e6:.0f} MB/s",
                    ours,
                    "s",
                    {"never compressed": plain},
                    "<= 1.1 of never compressed",
                    ours <= 1.1 * plain,
                    f"median of {ROUNDS}; store to store, both sides on this machine",
                )
            )
    return figures


def _text(size: int) -> bytes:
    """A table of numbers, as in a CSV file."""
    text = io.StringIO()
    for number in itertools.takewhile(lambda number: text.tell() < size, itertools.count()):
        text.write(f"{number},{random.random():.6f},{random.choice(('train', 'test'))}\n")
    return text.getvalue().encode()[:size]


async def _move(chunks: list[bytes], rate: float, features: list[str]) -> float:
    """Seconds until all of them are in the other store."""
    with tempfile.TemporaryDirectory(prefix="mlinfra-bench-") as name:
        folder = Path(name)
        far = ChunkStore(folder / "far")
        near = ChunkStore(folder / "near")
        digests = [near.put_chunk(chunk) for chunk in chunks]
        bulks: list[Bulk] = []

        async def on_session(session: LinkSession) -> None:
            bulks.append(Bulk(session, far))
            await bulks[0].receive()

        proxy = ChaosProxy(folder / "slow", folder / "agent", lambda number: Plan(rate=rate))
        async with anyio.create_task_group() as tasks:
            async with serve(SECRET, on_session, features=[FEATURE]) as server:
                tasks.start_soon(serve_unix, folder / "agent", server.handle)
                tasks.start_soon(proxy.run)
                while not ((folder / "agent").exists() and (folder / "slow").exists()):
                    await anyio.sleep(0.001)
                async with connect(
                    lambda: connect_unix(folder / "slow"), SECRET, features=features
                ) as session:
                    start = time.perf_counter()
                    mark, _ = await Bulk(session, near).send(digests)
                    await bulks[0].passed(mark)
                    took = time.perf_counter() - start
            tasks.cancel_scope.cancel()
        assert not far.missing(digests)
        return took
