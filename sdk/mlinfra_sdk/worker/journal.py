"""The journal: every message that a run published, on disk, in order.

One append-only file per run. A record is its length and CRC-32 (big endian, 4 bytes each) and the
encoded message; what a crash cut off at the end is ignored by readers.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_HEADER = struct.Struct("!II")


class Journal:
    """The journal of one run, open for writing. The file is 0600."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)

    def append(self, record: bytes) -> None:
        """Add one record; it survives the death of this process as soon as this returns."""
        data = _HEADER.pack(len(record), zlib.crc32(record)) + record
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self.size += len(data)

    def close(self) -> None:
        """Close the file; it stays until it is removed."""
        os.close(self._fd)


def read(path: Path) -> Iterator[bytes]:
    """The whole records of a journal, in order; ends at the first that is cut off or damaged."""
    with path.open("rb") as file:
        while True:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return
            length, checksum = _HEADER.unpack(header)
            record = file.read(length)
            if len(record) < length or zlib.crc32(record) != checksum:
                return
            yield record
