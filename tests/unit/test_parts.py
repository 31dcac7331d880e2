"""Files that come piece by piece lie in one place only, and go on where they were left."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3
from twins import Twins, contents, twins

from mlinfra_sdk.errors import ChunkMissing
from mlinfra_sdk.objects.store import ChunkStore, chunk_digest
from mlinfra_sdk.sync import messages
from mlinfra_sdk.sync.entries import CHUNK, ZEROS

LENGTH = 64 << 10
PIECES = [os.urandom(LENGTH), os.urandom(LENGTH), os.urandom(1000)]
DIGESTS = [chunk_digest(piece) for piece in PIECES]
CONTENT = PIECES[0] + PIECES[1] + PIECES[0] + PIECES[2]
ORDER = [DIGESTS[0], DIGESTS[1], DIGESTS[0], DIGESTS[2]]
NAME = blake3(CONTENT).digest()


@pytest.fixture
def store(tmp_path: Path) -> ChunkStore:
    return ChunkStore(tmp_path / "store")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Twins]:
    with twins(tmp_path) as it:
        yield it


def begin(store: ChunkStore) -> bool:
    return store.parts.open(NAME, ORDER, len(CONTENT), LENGTH)


def chunks(store: ChunkStore) -> list[Path]:
    return [path for path in store.root.glob("chunks/*/*") if path.is_file()]


def test_pieces_go_into_their_places_and_are_no_chunks(store: ChunkStore) -> None:
    assert begin(store)
    assert store.missing(ORDER) == DIGESTS
    for piece in PIECES:
        store.put_chunk(piece)
    assert store.missing(ORDER) == []
    assert store.read_chunk(DIGESTS[1]) == PIECES[1]
    assert chunks(store) == []
    part = store.parts.take(NAME)
    assert part is not None
    assert part.path.read_bytes() == CONTENT
    assert part.path.stat().st_mode & 0o777 == 0o600
    part.close()
    assert store.missing(ORDER) == DIGESTS
    with pytest.raises(ChunkMissing):
        store.read_chunk(DIGESTS[1])


def test_a_piece_that_belongs_to_no_file_is_a_chunk(store: ChunkStore) -> None:
    assert begin(store)
    other = store.put_chunk(b"x" * LENGTH)
    assert store.read_chunk(other) == b"x" * LENGTH
    assert len(chunks(store)) == 1


def test_what_came_before_is_found_again_and_checked(store: ChunkStore) -> None:
    assert begin(store)
    store.put_chunk(PIECES[0])
    store.put_chunk(PIECES[2])
    store.parts.close(NAME)
    store.put_chunk(PIECES[1])  # too late: a chunk as any other
    assert len(chunks(store)) == 1
    store.discard([DIGESTS[1]])

    other = ChunkStore(store.root)  # as another process would
    assert begin(other)
    assert other.missing(ORDER) == [DIGESTS[1]]
    other.parts.close(NAME)

    with (store.root / "parts" / NAME.hex()).open("r+b") as file:
        file.seek(2 * LENGTH + 5)
        file.write(b"!")  # one of the two places of the first piece
    assert begin(store)
    assert store.missing(ORDER) == DIGESTS[:2]


def test_one_process_at_a_time_puts_a_file_together(store: ChunkStore) -> None:
    assert begin(store)
    assert not begin(store)
    assert not begin(ChunkStore(store.root))
    store.parts.close(NAME)
    assert begin(ChunkStore(store.root))


def test_a_process_that_is_killed_leaves_what_had_come(store: ChunkStore) -> None:
    code = f"""if True:
        import os, signal, sys
        from pathlib import Path
        from mlinfra_sdk.objects.store import ChunkStore
        store = ChunkStore(Path(sys.argv[1]))
        store.parts.open({NAME!r}, {ORDER!r}, {len(CONTENT)}, {LENGTH})
        store.put_chunk(sys.stdin.buffer.read())
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", code, str(store.root)], input=PIECES[0])
    assert done.returncode == -9
    assert begin(store)
    assert store.missing(ORDER) == DIGESTS[1:]


def test_a_link_in_the_place_of_a_file_is_not_followed(store: ChunkStore, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (store.root / "parts").mkdir()
    (store.root / "parts" / NAME.hex()).symlink_to(victim)
    assert not begin(store)
    store.put_chunk(PIECES[0])
    assert victim.read_text() == "mine"
    assert store.missing(ORDER) == DIGESTS[1:]


def test_who_comes_too_late_changes_nothing(store: ChunkStore) -> None:
    assert begin(store)
    part = store.parts.take(NAME)
    assert part is not None
    part.close()
    assert not part.put(DIGESTS[0], PIECES[0])
    assert part.read(DIGESTS[0]) is None
    store.put_chunk(PIECES[0])
    assert len(chunks(store)) == 1


def test_what_nobody_completes_is_cleared_away(store: ChunkStore) -> None:
    assert begin(store)
    for piece in PIECES:
        store.put_chunk(piece)
    store.parts.close(NAME)
    path = store.root / "parts" / NAME.hex()
    assert store.collect_garbage(0) == 0  # it was in use just now
    os.utime(path, (0, 0))
    assert store.collect_garbage(0) >= len(CONTENT)
    assert not path.exists()


def test_what_an_older_file_has_in_common_need_not_come(store: ChunkStore, tmp_path: Path) -> None:
    older = tmp_path / "older"
    older.write_bytes(CONTENT[: 2 * LENGTH] + b"x" * LENGTH + PIECES[2] + b"longer")
    assert store.parts.open(NAME, ORDER, len(CONTENT), LENGTH, older)
    assert store.missing(ORDER) == [DIGESTS[0]]  # one of its two places is another
    store.put_chunk(PIECES[0])
    part = store.parts.take(NAME)
    assert part is not None
    assert part.path.read_bytes() == CONTENT
    part.close()


def big_file(folder: Path) -> bytes:
    """Seven pieces with a hole, two of which are the same, and an end."""
    piece = os.urandom(CHUNK)
    content = b"".join(
        [piece, os.urandom(CHUNK), bytes(CHUNK), piece, os.urandom(2 * CHUNK), bytes(10)]
    )
    with (folder / "big.bin").open("wb") as file:
        file.write(content[: 2 * CHUNK])
        file.seek(3 * CHUNK)
        file.write(content[3 * CHUNK :])
    return content


@pytest.mark.parametrize("up", [True, False])
def test_a_transfer_goes_on_where_it_was_cut(pair: Twins, up: bool) -> None:
    source, store = (pair.here, pair.store_there) if up else (pair.there, pair.store_here)
    source.mkdir(parents=True, exist_ok=True)
    content = big_file(source)
    put, left = ChunkStore.put_chunk, 3

    def cut(self: ChunkStore, data: bytes, digest: bytes | None = None) -> bytes:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        return put(self, data, digest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkStore, "put_chunk", cut)
        with pytest.raises(KeyboardInterrupt):
            pair.sync()
    assert chunks(store) == []
    assert len(list(store.root.glob("parts/*"))) == 1
    pair.store_here = ChunkStore(pair.store_here.root)
    pair.store_there = ChunkStore(pair.store_there.root)
    pair.files.forget(pair.peer)
    pair.restart_agent()
    pair.restart()
    pair.sync()
    assert (pair.here / "big.bin").read_bytes() == content
    assert (pair.there / "big.bin").read_bytes() == content
    moved = pair.peer.sent if up else pair.peer.received
    assert moved == CHUNK + 10  # of five different pieces that are no holes three had come
    assert list(store.root.glob("parts/*")) == []
    assert chunks(store) == []
    for file in (pair.here / "big.bin", pair.there / "big.bin"):
        assert file.stat().st_blocks * 512 < len(content)
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask()


def test_files_of_equal_content_and_shared_pieces(pair: Twins) -> None:
    content = big_file(pair.here)
    (pair.here / "copy.bin").write_bytes(content)
    (pair.here / "longer.bin").write_bytes(content + b"more")
    pair.sync()
    assert contents(pair.there) == contents(pair.here)
    assert pair.peer.sent < 5 * CHUNK
    assert chunks(pair.store_there) == list(pair.store_there.root.glob("parts/*")) == []


def test_a_file_that_changes_while_its_pieces_are_sent(pair: Twins) -> None:
    content = big_file(pair.here)
    changed = content[: 5 * CHUNK] + b"!" + content[5 * CHUNK + 1 :]

    def change(message: messages.AnyMessage) -> None:
        if isinstance(message, messages.Expect):
            pair.peer.before = lambda message: None
            (pair.here / "big.bin").write_bytes(changed)

    pair.peer.before = change
    pair.sync()
    pair.sync()
    assert contents(pair.there) == contents(pair.here) == {"big.bin": changed}


def test_progress_counts_what_was_over_before_anybody_waited_for_it(pair: Twins) -> None:
    for number in range(5):
        (pair.here / f"{number}.bin").write_bytes(os.urandom(10 * CHUNK))
    told: list[tuple[int, int]] = []
    pair.sync(progress=lambda done, total: told.append((done, total)))
    assert told == [(number * 10 * CHUNK, 50 * CHUNK) for number in range(5)]


def test_pieces_that_do_not_make_up_the_size_are_no_file(store: ChunkStore) -> None:
    for size in (3 * LENGTH, 4 * LENGTH + 1):
        assert not store.parts.open(NAME, ORDER, size, LENGTH)


def test_a_store_on_another_disk(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    with tempfile.TemporaryDirectory(dir=memory) as other, twins(tmp_path) as pair:
        pair.store_here = ChunkStore(Path(other) / "store")
        pair.restart_agent()
        pair.restart()
        pair.there.mkdir(parents=True)
        content = big_file(pair.there)
        pair.sync()
        copy = pair.here / "big.bin"
        assert copy.read_bytes() == content
        assert copy.stat().st_blocks * 512 < len(content)
        assert copy.stat().st_mode & 0o777 == 0o666 & ~umask()
        assert list(pair.store_here.root.glob("parts/*")) == []


def test_what_a_client_had_expected_is_closed_when_it_has_gone(pair: Twins) -> None:
    big_file(pair.here)

    def leave(message: messages.AnyMessage) -> None:
        if isinstance(message, messages.Apply):
            raise KeyboardInterrupt

    pair.peer.before = leave
    with pytest.raises(KeyboardInterrupt):
        pair.sync()
    (part,) = pair.store_there.root.glob("parts/*")
    other = ChunkStore(pair.store_there.root)
    digest = bytes.fromhex(part.name)
    pieces = [ZEROS] * 7
    assert not other.parts.open(digest, pieces, 7 * CHUNK, CHUNK)
    pair.files.forget(pair.peer)
    assert other.parts.open(digest, pieces, 7 * CHUNK, CHUNK)


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
