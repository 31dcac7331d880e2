"""Chunks over a real link between two stores."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mlinfra_sdk.errors import LinkClosed, StoreError
from mlinfra_sdk.link.client import connect
from mlinfra_sdk.link.frames import Channel
from mlinfra_sdk.link.server import serve
from mlinfra_sdk.link.session import LinkSession
from mlinfra_sdk.link.wire import SocketWire, Wire
from mlinfra_sdk.objects.bulk import COMPRESSED, MARK, RAW, Bulk
from mlinfra_sdk.objects.compression import FEATURE, Compressor, decompress
from mlinfra_sdk.objects.store import CHUNK_SIZE, ChunkStore

pytestmark = pytest.mark.anyio

PROTOCOL = Path(__file__).parents[2] / "docs" / "protocol.md"
SECRET = bytes(32)
COMPRESSIBLE = (np.arange(CHUNK_SIZE // 4, dtype="int32") // 100).tobytes()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def ends(
    folder: Path, features: tuple[str, ...] = (FEATURE,), there: tuple[str, ...] = (FEATURE,)
) -> AsyncIterator[tuple[Bulk, Bulk]]:
    """Both ends, each with a store; the second one receives."""
    far: list[Bulk] = []
    begun = anyio.Event()

    async def on_session(session: LinkSession) -> None:
        far.append(Bulk(session, ChunkStore(folder / "far")))
        begun.set()
        await far[0].receive()

    async with (
        anyio.create_task_group() as tasks,
        serve(SECRET, on_session, features=there) as server,
    ):

        async def factory() -> Wire:
            near, distant = socket.socketpair()
            tasks.start_soon(server.handle, SocketWire(distant))
            return SocketWire(near)

        async with connect(factory, SECRET, features=features) as session:
            await begun.wait()
            yield Bulk(session, ChunkStore(folder / "near")), far[0]
        tasks.cancel_scope.cancel()


def near(folder: Path) -> ChunkStore:
    return ChunkStore(folder / "near")


def far(folder: Path) -> ChunkStore:
    return ChunkStore(folder / "far")


async def test_all_chunks_are_stored_when_their_mark_has_passed(tmp_path: Path) -> None:
    chunks = [os.urandom(size) for size in (1, 1000, 10**6, CHUNK_SIZE, CHUNK_SIZE, CHUNK_SIZE)]
    digests = [near(tmp_path).put_chunk(chunk) for chunk in chunks]
    sizes: list[int] = []
    async with ends(tmp_path) as (here, there):
        mark, lost = await here.send(digests, moved=sizes.append)
        await there.passed(mark)
        assert far(tmp_path).missing(digests) == lost == []
        assert sorted(sizes) == sorted(map(len, chunks))
        assert there.stored == here.bytes_sent == there.bytes_received == sum(sizes)


async def test_several_transfers_at_once_each_have_their_mark(tmp_path: Path) -> None:
    digests = [near(tmp_path).put_chunk(os.urandom(10_000)) for _ in range(100)]
    async with ends(tmp_path) as (here, there):

        async def transfer(part: list[bytes]) -> None:
            mark, _ = await here.send(part)
            await there.passed(mark)
            assert far(tmp_path).missing(part) == []

        async with anyio.create_task_group() as tasks:
            for first in range(10):
                tasks.start_soon(transfer, digests[first::10])


async def test_what_can_be_compressed_is_and_what_cannot_is_not(tmp_path: Path) -> None:
    store = near(tmp_path)
    digests = [store.put_chunk(COMPRESSIBLE), store.put_chunk(os.urandom(CHUNK_SIZE))]
    async with ends(tmp_path) as (here, there):
        mark, _ = await here.send(digests)
        await there.passed(mark)
        assert far(tmp_path).missing(digests) == []
        assert CHUNK_SIZE < there.bytes_received < 1.5 * CHUNK_SIZE
        assert there.stored == 2 * CHUNK_SIZE


@pytest.mark.parametrize("features", [((FEATURE,), ()), ((), (FEATURE,))])
async def test_nothing_is_compressed_for_a_side_that_does_not_know_it(
    tmp_path: Path, features: tuple[tuple[str, ...], tuple[str, ...]]
) -> None:
    digest = near(tmp_path).put_chunk(COMPRESSIBLE)
    async with ends(tmp_path, *features) as (here, there):
        mark, _ = await here.send([digest])
        await there.passed(mark)
        assert there.bytes_received == CHUNK_SIZE
        assert far(tmp_path).has(digest)


async def test_what_the_sender_has_lost_is_told(tmp_path: Path) -> None:
    store = near(tmp_path)
    good, bad, gone = (store.put_chunk(os.urandom(1000)) for _ in range(3))
    store._path(bad).chmod(0o600)
    store._path(bad).write_bytes(b"damaged")
    async with ends(tmp_path) as (here, there):
        mark, lost = await here.send([good, bad, bytes(32)])
        await there.passed(mark)
        assert lost == [bytes(32)]
        assert far(tmp_path).missing([good, bad]) == [bad], "found by the one who receives it"
        mark, lost = await here.send([good, bad, gone], verify=True)
        assert lost == [bad]
        assert not store.has(bad)


@pytest.mark.parametrize("data", [b"", b"no zstd", zstandard.compress(bytes(CHUNK_SIZE + 1))])
async def test_damaged_chunks_are_missed_and_do_no_harm(tmp_path: Path, data: bytes) -> None:
    async with ends(tmp_path) as (here, there):
        await here._session.send(Channel.BULK, data, COMPRESSED)
        await here._session.send(Channel.BULK, b"good", RAW)
        await here._session.send(Channel.BULK, (1).to_bytes(8, "big"), MARK)
        await there.passed(1)
        assert there.stored == 4


async def test_a_store_that_cannot_take_a_chunk_is_told_at_its_mark_once(tmp_path: Path) -> None:
    digest = near(tmp_path).put_chunk(b"payload")
    async with ends(tmp_path) as (here, there):
        folder = far(tmp_path)._path(digest).parent
        folder.parent.mkdir()
        folder.write_text("in the way")
        mark, _ = await here.send([digest])
        with pytest.raises(StoreError, match="cannot be written"):
            await there.passed(mark)
        folder.unlink()
        mark, _ = await here.send([digest])
        await there.passed(mark)
        assert far(tmp_path).has(digest)


async def test_who_waits_for_a_mark_is_told_of_the_end(tmp_path: Path) -> None:
    async with ends(tmp_path) as (here, there), anyio.create_task_group() as tasks:

        async def wait() -> None:
            with pytest.raises(LinkClosed):
                await there.passed(1)

        tasks.start_soon(wait)
        await here._session.aclose()


def test_vectors_of_the_specification() -> None:
    text = PROTOCOL.read_text()
    rows = re.findall(r"^\| stream ([0-2]), [^|]* \| `([0-9a-f ]+)` \|$", text, re.M)
    vectors = {int(kind): bytes.fromhex(data) for kind, data in rows}
    assert vectors[RAW] == b"hello"
    assert decompress(vectors[COMPRESSED]) == b"a" * 600
    assert vectors[MARK] == (3).to_bytes(8, "big")


def test_only_slow_links_are_worth_it() -> None:
    compressor = Compressor()
    assert compressor.wanted, "nothing is known"
    for second in range(5):  # 10 MB each second, more waiting
        compressor.observe(10**9, second * 10**7, float(second))
    assert compressor.rate == 1e7 and compressor.wanted
    for second in range(5, 20):  # it has become a fast one
        compressor.observe(10**12, 10**8 + second * 10**9, float(second))
    assert not compressor.wanted
    assert compressor.compress(COMPRESSIBLE) is None


def test_a_link_that_waits_for_us_may_be_quicker_than_it_seems() -> None:
    compressor = Compressor()
    for second in range(5):
        compressor.observe(second * 10**9, second * 10**9, float(second))
    compressor.observe(5 * 10**9 + 10**6, 4 * 10**9 + 10**6, 5.0)
    assert compressor.rate == 1e9
    compressor.rest()
    compressor.observe(6 * 10**9, 4 * 10**9 + 2 * 10**6, 1000.0)
    assert compressor.rate == 1e9, "the time without a transfer does not count"


@given(st.binary(max_size=2000), st.integers(0, 200))
def test_any_chunk_comes_back(data: bytes, repeat: int) -> None:
    chunk = data * repeat
    packed = Compressor().compress(chunk)
    assert packed is None or (decompress(packed) == chunk and len(packed) < len(chunk))


@given(st.binary(max_size=2000))
def test_what_is_no_compressed_chunk_is_refused(data: bytes) -> None:
    try:
        size = len(decompress(data))
    except ValueError:
        return
    assert size <= CHUNK_SIZE
