"""The journal: every message that a run published, on disk, in order, within a size limit.

A journal is a folder of segments, each named by the number of its first record. A record is its
length and CRC-32 (big endian, 4 bytes each) and its bytes; what a crash cut off at the end of the
last segment is ignored by readers. Over the limit the oldest segments but the first are dropped:
the beginning of a run and its most recent output are worth most.
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIMIT = 256 << 20
"""Bytes that the journal of one run may take."""

_SEGMENTS = 32
_HEADER = struct.Struct("!II")
_READ = 1 << 20


@dataclass(frozen=True)
class Gap:
    """Records that were dropped, by their first and last number."""

    first: int
    last: int


@dataclass
class _Segment:
    first: int
    path: Path
    last: int
    size: int = 0


class Journal:
    """The journal of one run. Files are 0600; nothing is written before the first record."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder = folder
        self.last = 0
        """Number of the last record; the first is 1."""
        self._limit = limit
        self._size = 0
        self._segments: list[_Segment] = []
        self._fd = -1

    @classmethod
    def recover(cls, folder: Path, limit: int = LIMIT) -> Journal:
        """The journal that another process left. What a crash cut off is removed."""
        journal = cls(folder, limit)
        for path in sorted(folder.glob("*.records")):
            first, size = int(path.stem), 0
            for record in _records(path.read_bytes()):
                size += _HEADER.size + len(record)
                journal.last = first
                first += 1
            if size:
                os.truncate(path, size)
                journal._segments.append(_Segment(int(path.stem), path, journal.last, size))
                journal._size += size
            else:
                path.unlink()
        return journal

    def append(self, record: bytes) -> int:
        """Add a record and give its number; once this returns it survives this process."""
        if self._fd < 0 or self._segments[-1].size > self._limit // _SEGMENTS:
            self._next_segment()
        data = b"".join((_HEADER.pack(len(record), zlib.crc32(record)), record))
        written = os.write(self._fd, data)
        while written < len(data):
            written += os.write(self._fd, data[written:])
        self._segments[-1].size += len(data)
        self._size += len(data)
        self.last += 1
        self._segments[-1].last = self.last
        return self.last

    @property
    def endangered(self) -> int:
        """Number of the last record that the next ones may push out; 0 for none."""
        if self._size <= self._limit or len(self._segments) < 2:
            return 0
        return self._segments[1].last

    def _next_segment(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        first = self.last + 1
        segment = _Segment(first, self.folder / f"{first:012}.records", self.last)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        self._fd = os.open(segment.path, flags, 0o600)
        self._segments.append(segment)
        while self._size > self._limit and len(self._segments) > 2:
            dropped = self._segments.pop(1)
            dropped.path.unlink()
            self._size -= dropped.size

    def close(self) -> None:
        """No more records come; readers may go on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Close the journal and delete it."""
        self.close()
        self._segments.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def reader(self, after: int = 0) -> Reader:
        """A reader of the records whose numbers are above ``after``."""
        return Reader(self, after)


class Reader:
    """Reads a journal while it grows."""

    def __init__(self, journal: Journal, after: int) -> None:
        self.number = 0
        """Number of the last record that was passed."""
        self._journal = journal
        self._after = after
        self._first = 0
        self._offset = 0

    @property
    def at_end(self) -> bool:
        """Whether all records so far have been read."""
        return self.number >= self._journal.last

    def read(self) -> list[bytes | Gap]:
        """The next records, about a megabyte of them; empty at the end."""
        found: list[bytes | Gap] = []
        while not found and not self.at_end:
            segment = self._segment()
            if segment is None:
                break
            if segment.first > self.number + 1:
                found.append(Gap(self.number + 1, segment.first - 1))
                self.number = segment.first - 1
            if segment.first != self._first:
                self._first, self._offset = segment.first, 0
            before = self.number
            found += self._read(segment)
            if self.number == before:
                break
        return found

    def _segment(self) -> _Segment | None:
        """The segment that holds the next record, or the next one that still exists."""
        return next((it for it in self._journal._segments if it.last > self.number), None)

    def _read(self, segment: _Segment) -> Iterator[bytes]:
        with segment.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read(_READ)
            if len(data) >= _HEADER.size:
                whole = _HEADER.size + _HEADER.unpack_from(data)[0]
                if whole > len(data):
                    data += file.read(whole - len(data))
        for record in _records(data):
            self._offset += _HEADER.size + len(record)
            self.number += 1
            if self.number > self._after:
                yield record


def _records(data: bytes) -> Iterator[bytes]:
    """The whole records at the beginning of ``data``."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, checksum = _HEADER.unpack_from(data, offset)
        record = data[offset + _HEADER.size : offset + _HEADER.size + length]
        if len(record) < length or zlib.crc32(record) != checksum:
            return
        yield record
        offset += _HEADER.size + length
