"""A local folder as a dataset: its files as chunks, read where they lie."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import msgspec
from blake3 import blake3

from mlinfra_sdk.datasets.cache import Entry
from mlinfra_sdk.errors import ChunkCorrupt, RequestError
from mlinfra_sdk.objects.store import CHUNK_SIZE, chunk_digest

_THREADS = 2


class File(msgspec.Struct, frozen=True):
    """A file of a folder: its path below it, and its content."""

    path: str
    size: int
    executable: bool
    chunks: list[bytes]

    def entry(self) -> Entry:
        """As the cache lists it."""
        mark = blake3(b"".join(self.chunks) + bytes([self.executable])).hexdigest(16)
        return Entry(self.path, self.size, mark)


class _Known(msgspec.Struct, array_like=True):
    size: int
    modified: int
    changed: int
    """Tells of another content also where ``cp -p`` has kept size and time of modification."""
    inode: int
    chunks: list[bytes]


class Folder:
    """The files below ``root`` (or the one file ``root``). Digests are kept in ``index``, so a file
    is read again only when it has changed."""

    def __init__(self, root: Path, index: Path) -> None:
        self._root = root
        self._index = index
        self._places: dict[bytes, tuple[Path, int, int]] = {}

    def check(self) -> None:
        """Raises :class:`RequestError` unless it is there."""
        if not self._root.exists():
            raise RequestError(
                f"data={self._root}: there is no such file or folder.", hint="Check the spelling."
            )

    def scan(self) -> list[File]:
        """All files, in the order of their paths. Links are followed to files, not to folders;
        those to folders and to nothing are left out. Raises :class:`RequestError` for what may
        not be read, and for names that are not UTF-8."""
        self.check()
        known = self._load()
        with ThreadPoolExecutor(_THREADS) as pool:
            scanned = list(pool.map(lambda path: self._scan(path, known), self._paths()))
        self._save({file.path: state for file, state in scanned})
        for file, _ in scanned:
            for number, digest in enumerate(file.chunks):
                place = self._place(file.path), number * CHUNK_SIZE
                size = min(CHUNK_SIZE, file.size - place[1])
                self._places[digest] = (*place, size)
        return [file for file, _ in scanned]

    def _paths(self) -> list[str]:
        if self._root.is_file():
            return [_named(self._root.name)]
        found = []
        for folder, folders, names in os.walk(self._root, onerror=_refuse):
            folders.sort()
            found += [
                _named(os.path.relpath(os.path.join(folder, name), self._root))
                for name in sorted(names)
                if _is_file(os.path.join(folder, name))
            ]
        return found

    def _place(self, path: str) -> Path:
        return self._root if self._root.is_file() else self._root / path

    def _scan(self, path: str, known: dict[str, _Known]) -> tuple[File, _Known]:
        place = self._place(path)
        try:
            status = place.stat()
            state = known.get(path)
            facts = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
            if state is None or facts != (state.size, state.modified, state.changed, state.inode):
                state = _Known(*facts, list(_digests(place)))
        except OSError as error:
            raise RequestError(f"{place} cannot be read: {error.strerror}.") from None
        return File(path, state.size, bool(status.st_mode & 0o100), state.chunks), state

    def _load(self) -> dict[str, _Known]:
        try:
            return msgspec.msgpack.decode(self._index.read_bytes(), type=dict[str, _Known])
        except (OSError, msgspec.DecodeError):
            return {}

    def _save(self, states: dict[str, _Known]) -> None:
        self._index.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self._index.with_suffix(f".{secrets.token_hex(8)}")
        temporary.write_bytes(msgspec.msgpack.encode(states))
        temporary.replace(self._index)

    # As a source of chunks

    def read_chunk(self, digest: bytes, *, verify: bool = True) -> bytes:
        """A chunk of a file. Raises :class:`ChunkCorrupt` if the file cannot be read any more, or
        has been changed since it was scanned; who does not have that found out gets another chunk
        then."""
        path, offset, size = self._places[digest]
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError:
            data, verify = b"", True
        if verify and chunk_digest(data) != digest:
            raise ChunkCorrupt(f"{path} was changed while it was sent.", hint="Run the cell again.")
        return data

    def size(self, digest: bytes) -> int:
        """Bytes of a chunk."""
        return self._places[digest][2]


def _named(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise RequestError(
            f"A dataset cannot have the file {os.fsencode(path)!r}: its name is not UTF-8.",
            hint="Rename it.",
        ) from None
    return path


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except PermissionError as error:
        _refuse(error)
    except OSError:  # a link to nothing, or a file that has been removed in this moment
        return False


def _refuse(error: OSError) -> NoReturn:
    name = os.fsencode(error.filename).decode(errors="backslashreplace")
    raise RequestError(f"{name} cannot be read: {error.strerror}.") from None


def _digests(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_SIZE):
            yield chunk_digest(chunk)
