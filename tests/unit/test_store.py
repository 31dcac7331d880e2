from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlinfra_sdk.errors import ChunkCorrupt, ChunkMissing, StoreError
from mlinfra_sdk.objects.store import CHUNK_SIZE, INLINE_LIMIT, ChunkStore, chunk_digest


@pytest.fixture
def store(tmp_path: Path) -> ChunkStore:
    return ChunkStore(tmp_path / "store")


def chunk_files(store: ChunkStore) -> list[Path]:
    return sorted(path for path in store.root.glob("chunks/*/*"))


def make_older(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_the_same_directory_is_the_same_store(tmp_path: Path) -> None:
    first = ChunkStore(tmp_path / "a")
    assert ChunkStore(tmp_path / "a").id == first.id
    assert ChunkStore(tmp_path / "b").id != first.id


def test_chunks_are_stored_once_and_read_back(store: ChunkStore) -> None:
    digest = store.put_chunk(b"payload")
    assert digest == chunk_digest(b"payload")
    assert store.put_chunk(bytearray(b"payload")) == digest
    assert store.read_chunk(digest) == b"payload"
    assert len(chunk_files(store)) == 1


def test_files_are_private_and_read_only(store: ChunkStore) -> None:
    store.put_chunk(b"payload")
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700
    assert stat.S_IMODE(chunk_files(store)[0].stat().st_mode) == 0o400


def test_missing_lists_each_absent_digest_once(store: ChunkStore) -> None:
    here = store.put_chunk(b"here")
    absent = chunk_digest(b"absent")
    assert store.missing([absent, here, absent]) == [absent]
    with pytest.raises(ChunkMissing, match=absent.hex()):
        store.read_chunk(absent)


def test_a_damaged_chunk_is_removed(store: ChunkStore) -> None:
    digest = store.put_chunk(b"payload")
    path = chunk_files(store)[0]
    path.chmod(0o600)
    path.write_bytes(b"PAYLOAD")
    with pytest.raises(ChunkCorrupt):
        store.read_chunk(digest)
    assert not store.has(digest)


def test_a_chunk_torn_before_the_last_boot_counts_as_missing(store: ChunkStore) -> None:
    digest = store.put_chunk(b"payload")
    path = chunk_files(store)[0]
    path.chmod(0o600)
    path.write_bytes(b"\0" * 7)
    make_older(path, 10 * 365 * 86400)
    assert store.missing([digest]) == [digest]


def test_what_something_else_has_written_to_is_verified(store: ChunkStore) -> None:
    good, bad = store.put_chunk(b"good one"), store.put_chunk(b"bad one")
    for digest, content in ((good, b"good one"), (bad, b"bad two")):
        store._path(digest).chmod(0o600)
        store._path(digest).write_bytes(content)
    assert store.missing([good, bad]) == [bad]
    assert store.put_chunk(b"bad one") == bad
    assert store.missing([good, bad]) == []


@pytest.mark.parametrize("seconds, found", [(1800, False), (7200, True)])
def test_rot_is_found_after_an_hour(store: ChunkStore, seconds: int, found: bool) -> None:
    store._booted = 0.0  # this computer may have been started just now
    digest = store.put_chunk(b"payload")
    path = store._path(digest)
    status = path.stat()
    path.chmod(0o600)
    path.write_bytes(b"pAyload")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - seconds * 10**9))
    assert store.has(digest) is not found


def test_mapped_memory_whose_file_was_written_to_is_told_once(store: ChunkStore) -> None:
    ref = store.put_buffer(os.urandom(2 * CHUNK_SIZE))
    view = store.map(ref)
    store.check_mapped()
    path = store._path(ref.chunks[1])
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.write(bytes(100))
    with pytest.raises(ChunkCorrupt, match=ref.chunks[1].hex()):
        ChunkStore(store.root).check_mapped()
    ChunkStore(store.root).check_mapped()
    assert len(view) == 2 * CHUNK_SIZE


def test_mapped_memory_outlives_its_files(store: ChunkStore) -> None:
    data = os.urandom(2 * CHUNK_SIZE)
    view = store.map(store.put_buffer(data))
    for path in chunk_files(store):
        path.unlink()
    store.check_mapped()
    assert view == data
    assert store.read(store.put_buffer(view)) == data, "stored again"


def test_pinned_chunks_stay_while_their_owner_does(store: ChunkStore, tmp_path: Path) -> None:
    owner = tmp_path / "run"
    owner.mkdir()
    digests = [store.put_chunk(bytes([i]) * 1000) for i in range(3)]
    store.pin("one", digests[:2], owner)
    store.pin("other", digests[1:2], tmp_path)
    for path in chunk_files(store):
        make_older(path, 7200)
    assert store.collect_garbage(0) == 1000
    assert [path.name for path in chunk_files(store)] == sorted(d.hex() for d in digests[:2])
    owner.rmdir()
    assert store.collect_garbage(0) == 1000
    store.unpin("other")
    store.unpin("other")
    assert store.collect_garbage(0) == 1000


def test_garbage_collection_leaves_room_on_the_disk(store: ChunkStore) -> None:
    store.put_chunk(b"payload")
    make_older(chunk_files(store)[0], 7200)
    assert store.collect_garbage(10**9, least_free=0.0) == 0
    assert store.collect_garbage(10**9, least_free=1.0) == 7


def test_a_writer_that_is_killed_leaves_nothing_that_counts(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from mlinfra_sdk.objects.store import *\n"
        "store = ChunkStore(Path(sys.argv[1]))\n"
        "while True: print(store.put_chunk(os.urandom(CHUNK_SIZE)).hex(), flush=True)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    told = [writer.stdout.readline().strip() for _ in range(5)]
    writer.kill()
    told += [line.strip() for line in writer.stdout if len(line) == 65]
    writer.wait()
    store = ChunkStore(tmp_path / "store")
    assert store.missing(map(bytes.fromhex, told)) == []
    for path in chunk_files(store):
        if not path.name.startswith("."):
            assert chunk_digest(path.read_bytes()).hex() == path.name


def test_using_a_chunk_marks_it_as_used(store: ChunkStore) -> None:
    digest = store.put_chunk(b"payload")
    make_older(chunk_files(store)[0], 1800)
    assert store.has(digest)
    assert time.time() - chunk_files(store)[0].stat().st_mtime < 60


@pytest.mark.parametrize(
    "size",
    [0, 1, INLINE_LIMIT - 1, INLINE_LIMIT, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * CHUNK_SIZE + 12345],
)
def test_buffers_of_all_sizes_come_back_writable(store: ChunkStore, size: int) -> None:
    data = os.urandom(size)
    ref = store.put_buffer(data)
    assert ref.size == size
    assert (ref.inline is None) == (size >= INLINE_LIMIT)
    view = store.map(ref)
    assert view.tobytes() == data
    assert store.read(ref) == data
    if size:
        view[0] ^= 255
        assert store.read(ref) == data


def test_equal_chunks_share_a_file(store: ChunkStore) -> None:
    store.put_buffer(bytes(10 * CHUNK_SIZE))
    assert len(chunk_files(store)) == 1


def test_digesting_stores_nothing(store: ChunkStore) -> None:
    data = os.urandom(2 * CHUNK_SIZE)
    ref = store.digest_buffer(data)
    assert chunk_files(store) == []
    assert store.put_buffer(data) == ref
    assert len(chunk_files(store)) == 2


def test_mapping_needs_all_chunks(store: ChunkStore) -> None:
    ref = store.put_buffer(os.urandom(2 * CHUNK_SIZE))
    chunk_files(store)[0].unlink()
    with pytest.raises(ChunkMissing):
        store.map(ref)


def test_mapping_a_truncated_chunk_fails_instead_of_crashing(store: ChunkStore) -> None:
    ref = store.put_buffer(os.urandom(2 * CHUNK_SIZE))
    path = chunk_files(store)[0]
    path.chmod(0o600)
    os.truncate(path, 100)
    with pytest.raises(ChunkMissing):
        store.map(ref)


def test_a_store_that_cannot_be_written_says_so(store: ChunkStore) -> None:
    digest = chunk_digest(b"payload")
    (store.root / "chunks").mkdir()
    (store.root / "chunks" / digest.hex()[:2]).write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        store.put_chunk(b"payload")


def test_garbage_collection_removes_the_least_recently_used(store: ChunkStore) -> None:
    digests = [store.put_chunk(bytes([i]) * 1000) for i in range(4)]
    for age, digest in zip((5, 4, 3, 0), digests, strict=True):
        make_older(store.root / "chunks" / digest.hex()[:2] / digest.hex(), age * 7200)
    assert store.collect_garbage(limit_bytes=2500) == 2000
    assert {path.name for path in chunk_files(store)} == {d.hex() for d in digests[2:]}
    assert store.collect_garbage(limit_bytes=0) == 1000, "never younger than an hour"
    assert store.has(digests[3])


def test_garbage_collection_removes_leftovers_of_crashed_writers(store: ChunkStore) -> None:
    store.put_chunk(b"payload")
    leftover = chunk_files(store)[0].with_name(".0123456789abcdef")
    leftover.write_bytes(b"pay")
    make_older(leftover, 7200)
    assert store.collect_garbage(limit_bytes=10**9) == 3
    assert not leftover.exists()


def test_several_processes_may_write_the_same_chunks(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from mlinfra_sdk.objects.store import ChunkStore\n"
        "store = ChunkStore(Path(sys.argv[1]))\n"
        "print(store.id, *(store.put_chunk(i.to_bytes(4, 'big') * 5000).hex()"
        " for i in range(100)))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "store")]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    results = {writer.communicate(timeout=60)[0] for writer in writers}
    assert len(results) == 1 and all(writer.returncode == 0 for writer in writers)
    store = ChunkStore(tmp_path / "store")
    _, *digests = results.pop().split()
    assert store.missing(bytes.fromhex(digest.decode()) for digest in digests) == []


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=3000))
def test_any_chunk_comes_back(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    store = ChunkStore(tmp_path_factory.mktemp("store"))
    assert store.read_chunk(store.put_chunk(data)) == data
