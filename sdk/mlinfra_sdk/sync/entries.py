"""What both sides know of one path, and how content is named."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import msgspec
from blake3 import blake3

CHUNK = 1 << 20
"""Files are read, compared and sent in pieces of this size. They are fixed: data files grow at
their end or change in place, and where an insertion has moved the rest it is sent again. A smaller
piece would cost more to name than it saves; what is not larger than one travels in packs."""

_MANY = 64
_THREADS = min(4, os.cpu_count() or 1)

FILE, FOLDER, LINK = "f", "d", "l"
ABSENT = b""
"""The state of a path at which nothing is."""


class Entry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What lies at a path. ``mtime`` is in nanoseconds; ``digest`` is that of a file's content
    (empty while nobody has read it) or a link's target; ``chunks`` are the digests of the pieces
    of a file that has more than one."""

    path: bytes
    kind: str
    size: int = 0
    mtime: int = 0
    executable: bool = False
    digest: bytes = b""
    chunks: tuple[bytes, ...] = ()

    @property
    def state(self) -> bytes:
        """Equal for what is alike in all that is kept alike."""
        if self.kind == FILE:
            return (b"x" if self.executable else b"f") + self.digest
        return self.kind.encode() + self.digest


def digest_of(data: bytes | bytearray | memoryview) -> bytes:
    """The name of a piece."""
    return blake3(data).digest()


ZEROS = digest_of(bytes(CHUNK))
"""The name of a piece of a hole."""


def digest_of_chunks(chunks: tuple[bytes, ...]) -> bytes:
    """The digest of a file of several pieces."""
    return digest_of(b"".join(chunks))


def read_file(fd: int, size: int) -> tuple[bytes, tuple[bytes, ...], bytes | None]:
    """Digest and pieces of an open file, and its content if it is no larger than one piece.
    Holes of sparse files are not read."""
    if size <= CHUNK:
        data = read_piece(fd, 0, size)
        return digest_of(data), (), data
    pieces = []
    data_at = -1
    for offset in range(0, size, CHUNK):
        end = min(offset + CHUNK, size)
        if data_at < offset:
            data_at = _next_data(fd, offset, size)
        hole = data_at >= end and end - offset == CHUNK
        pieces.append((offset, 0 if hole else end - offset))
    chunks = tuple(_digests(fd, pieces))
    return digest_of_chunks(chunks), chunks, None


def _digests(fd: int, pieces: list[tuple[int, int]]) -> list[bytes]:
    """Of pieces by their offset and length (0: a hole), several at a time where there are many."""

    def digest(piece: tuple[int, int]) -> bytes:
        return digest_of(read_piece(fd, *piece)) if piece[1] else ZEROS

    if len(pieces) < _MANY:
        return list(map(digest, pieces))
    pool = ThreadPoolExecutor(_THREADS)
    try:
        return list(pool.map(digest, pieces))
    finally:
        pool.shutdown(cancel_futures=True)


def read_piece(fd: int, offset: int, length: int) -> bytes:
    """``length`` bytes, or less where the file ends."""
    data = os.pread(fd, length, offset)
    if len(data) in (0, length):
        return data
    parts = [data]
    read = len(data)
    while read < length and (data := os.pread(fd, length - read, offset + read)):
        parts.append(data)
        read += len(data)
    return b"".join(parts)


def _next_data(fd: int, offset: int, size: int) -> int:
    """Where the next data begins at or after ``offset``; ``size`` if only a hole follows."""
    with suppress(AttributeError):  # not every system has it
        try:
            return os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            return size if error.errno == errno.ENXIO else offset
    return offset


def piece_length(entry: Entry, index: int) -> int:
    """Bytes of a piece of a file."""
    return min(CHUNK, entry.size - index * CHUNK)
