from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlinfra_sdk.objects import regions
from mlinfra_sdk.objects.store import CHUNK_SIZE, ChunkStore

SIZE = 3 * CHUNK_SIZE + 5000

needs_page_tables = pytest.mark.skipif(
    not regions.page_tables_usable(), reason="this system does not show which pages were written"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ChunkStore:
    return ChunkStore(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def data() -> bytes:
    return os.urandom(SIZE)


@needs_page_tables
def test_reading_leaves_all_chunks_clean(store: ChunkStore, data: bytes) -> None:
    ref = store.put_buffer(data)
    view = store.map(ref)
    assert view.tobytes() == data
    assert regions.clean_digests(view, CHUNK_SIZE) == ref.chunks
    assert store.unchanged_bytes(view) == SIZE


@needs_page_tables
@settings(max_examples=25, deadline=None)
@given(offsets=st.sets(st.integers(0, SIZE - 1), max_size=4))
def test_exactly_the_written_chunks_are_dirty(
    store: ChunkStore, data: bytes, offsets: set[int]
) -> None:
    ref = store.put_buffer(data)
    view = store.map(ref)
    for offset in offsets:
        view[offset] ^= 1
    written = {offset // CHUNK_SIZE for offset in offsets}
    clean = regions.clean_digests(view, CHUNK_SIZE)
    assert clean == [None if i in written else digest for i, digest in enumerate(ref.chunks)]
    changed = store.put_buffer(view)
    assert {i for i in range(4) if changed.chunks[i] != ref.chunks[i]} == written
    assert store.read(changed) == bytes(view)
    assert store.read(ref) == data


@needs_page_tables
def test_whole_chunks_of_a_region_are_recognised(store: ChunkStore, data: bytes) -> None:
    ref = store.put_buffer(data)
    view = store.map(ref)
    view[3 * CHUNK_SIZE] ^= 1
    middle = view[CHUNK_SIZE : 3 * CHUNK_SIZE]
    assert regions.clean_digests(middle, CHUNK_SIZE) == ref.chunks[1:3]
    assert regions.clean_digests(view[CHUNK_SIZE:], CHUNK_SIZE) == [*ref.chunks[1:3], None]
    assert regions.clean_digests(view[10:CHUNK_SIZE], CHUNK_SIZE) is None
    assert regions.clean_digests(view[: CHUNK_SIZE + 10], CHUNK_SIZE) is None


def test_memory_outside_of_regions_is_unknown() -> None:
    assert regions.clean_digests(memoryview(bytearray(CHUNK_SIZE)), CHUNK_SIZE) is None
    assert regions.clean_digests(memoryview(bytes(10)), CHUNK_SIZE) is None


@needs_page_tables
def test_a_clean_chunk_that_left_the_store_is_written_again(store: ChunkStore, data: bytes) -> None:
    ref = store.put_buffer(data)
    view = store.map(ref)
    (store.root / "chunks" / ref.chunks[1].hex()[:2] / ref.chunks[1].hex()).unlink()
    assert store.put_buffer(view) == ref
    assert store.missing(ref.chunks) == []


def test_regions_leave_the_registry_with_their_memory(store: ChunkStore, data: bytes) -> None:
    gc.collect()
    before = len(regions._REGISTRY._regions)
    views = [store.map(store.put_buffer(data)) for _ in range(3)]
    part = views[1][CHUNK_SIZE:]
    del views
    assert len(regions._REGISTRY._regions) <= before + 1
    assert part[:100] == data[CHUNK_SIZE : CHUNK_SIZE + 100]
    del part
    assert len(regions._REGISTRY._regions) == before
    assert regions._REGISTRY._addresses == sorted(regions._REGISTRY._regions)


def test_without_page_tables_everything_is_hashed(
    store: ChunkStore, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "page_tables_usable", lambda: False)
    ref = store.put_buffer(data)
    view = store.map(ref)
    assert regions.clean_digests(view, CHUNK_SIZE) is None
    assert store.put_buffer(view) == ref


def test_a_forked_child_sees_its_own_writes(store: ChunkStore, data: bytes) -> None:
    ref = store.put_buffer(data)
    view = store.map(ref)
    child = os.fork()
    if child == 0:
        view[0] ^= 1
        ok = store.digest_buffer(view).chunks[0] != ref.chunks[0]
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert store.digest_buffer(view) == ref


def test_without_mapping_content_is_read(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "_libc_mmap", lambda: None)
    store = ChunkStore(tmp_path)
    view = store.map(store.put_buffer(data))
    view[0] ^= 255
    assert view[1:] == data[1:]
