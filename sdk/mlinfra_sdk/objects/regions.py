"""Memory regions that are mapped copy-on-write from chunk files.

A region is one contiguous private mapping of many files. Which of its pages were written since is
read from the kernel's page tables (``/proc/self/pagemap``), so that an unchanged gigabyte is
recognised in milliseconds, without hashing it.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value
_SUPPORTED = sys.platform.startswith(("linux", "darwin"))

# Of a pagemap entry only the top byte matters: bit 63 present, 62 swapped, 61 backed by a file.
# A page of a private file mapping is backed by its file until it is written.
_DIRTY = bytes(int(bool(top & 0xC0) and not top & 0x20) for top in range(256))


class _Memory(mmap.mmap):
    """Anonymous memory that leaves the registry right before it is unmapped."""

    address: int = 0

    def __del__(self) -> None:
        _REGISTRY.remove(self.address)


class Region:
    """Memory that was mapped from chunks with these digests, ``chunk_size`` bytes each, in these
    ``files`` (their inode numbers)."""

    def __init__(
        self, memory: _Memory, chunk_size: int, digests: Sequence[bytes], files: list[int]
    ) -> None:
        self.address = memory.address
        self.size = len(memory)
        self.chunk_size = chunk_size
        self.digests = digests
        self.files = files
        self._memory = weakref.ref(memory)

    def unwritten(self, index: int) -> bytes | None:
        """What the memory of a chunk holds, unless it was written by this process; empty if its
        file has been cut short."""
        memory = self._memory()
        start = index * self.chunk_size
        length = min(self.chunk_size, self.size - start)
        if memory is None or self.clean_digests(start, length) != [self.digests[index]]:
            return None
        try:
            fd = os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:  # to look at the memory itself would kill the process if the file is too short
            return os.pread(fd, length, self.address + start)
        except OSError:
            return b""
        finally:
            os.close(fd)

    def clean_digests(self, offset: int, length: int) -> list[bytes | None] | None:
        """Digests of the chunks in [offset, offset + length), None for each that was written.

        The whole answer is None if the range is not one of whole chunks of this region.
        """
        end = offset + length
        if offset % self.chunk_size or (end % self.chunk_size and end != self.size):
            return None
        page = mmap.PAGESIZE
        flags = _written_pages(self.address + offset, -(-length // page))
        if flags is None:
            return None
        per_chunk = self.chunk_size // page
        first = offset // self.chunk_size
        count = -(-length // self.chunk_size)
        return [
            None
            if flags.find(1, i * per_chunk, (i + 1) * per_chunk) >= 0
            else self.digests[first + i]
            for i in range(count)
        ]


class _Registry:
    """Live regions by address."""

    def __init__(self) -> None:
        # Reentrant: a region's __del__ may run inside any of these methods.
        self._lock = threading.RLock()
        self._addresses: list[int] = []
        self._regions: dict[int, Region] = {}

    def add(self, region: Region) -> None:
        with self._lock:
            bisect.insort(self._addresses, region.address)
            self._regions[region.address] = region

    def remove(self, address: int) -> None:
        with self._lock:
            if self._regions.pop(address, None) is not None:
                del self._addresses[bisect.bisect_left(self._addresses, address)]

    def all(self) -> list[Region]:
        with self._lock:
            return list(self._regions.values())

    def find(self, address: int, length: int) -> Region | None:
        with self._lock:
            index = bisect.bisect_right(self._addresses, address) - 1
            if index < 0:
                return None
            region = self._regions[self._addresses[index]]
        return region if address + length <= region.address + region.size else None


_REGISTRY = _Registry()


def map_chunks(
    paths: Sequence[Path], size: int, chunk_size: int, digests: Sequence[bytes]
) -> memoryview | None:
    """One writable private region with the content of the files, or None where that is impossible.

    Writes stay in this process. The memory is released with the last view of it.
    """
    libc_mmap = _libc_mmap()
    if libc_mmap is None or chunk_size % mmap.PAGESIZE:
        return None
    memory = _Memory(-1, size)
    address = _address(memory)
    files = []
    for index, path in enumerate(paths):
        offset = index * chunk_size
        length = min(chunk_size, size - offset)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            if status.st_size != length:  # access beyond its end would kill the process
                return None
            files.append(status.st_ino)
            mapped = libc_mmap(
                address + offset,
                length,
                mmap.PROT_READ | mmap.PROT_WRITE,
                mmap.MAP_PRIVATE | _MAP_FIXED,
                fd,
                0,
            )
        finally:
            os.close(fd)
        if mapped == _MAP_FAILED:  # too many mappings in this process
            return None
    if page_tables_usable():
        memory.address = address
        _REGISTRY.add(Region(memory, chunk_size, digests, files))
    return memoryview(memory)


def mapped() -> list[Region]:
    """All mapped memory of this process."""
    return _REGISTRY.all()


def clean_digests(view: memoryview, chunk_size: int) -> list[bytes | None] | None:
    """Digest of each chunk of ``view`` that is known to be unchanged; None if nothing is known."""
    if view.readonly or not view.nbytes:
        return None
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    region = _REGISTRY.find(address, view.nbytes)
    if region is None or region.chunk_size != chunk_size:
        return None
    return region.clean_digests(address - region.address, view.nbytes)


@lru_cache(maxsize=1)
def page_tables_usable() -> bool:
    """Whether this system tells written pages of a private mapping from others (tried once)."""
    libc_mmap = _libc_mmap()
    if libc_mmap is None or _written_pages(0, 1) is None:
        return False
    page = mmap.PAGESIZE
    with tempfile.TemporaryFile() as file, mmap.mmap(-1, 3 * page) as memory:
        file.write(b"x" * 3 * page)
        file.flush()
        address = _address(memory)
        flags = mmap.MAP_PRIVATE | _MAP_FIXED
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        if libc_mmap(address, 3 * page, protection, flags, file.fileno(), 0) == _MAP_FAILED:
            return False
        memory[0]  # read: must not count as written
        memory[page] = 1
        return _written_pages(address, 3) == b"\0\1\0"


def _written_pages(address: int, count: int) -> bytes | None:
    """One byte for each page from ``address``: 1 if it was written."""
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        entries = os.pread(fd, count * 8, address // mmap.PAGESIZE * 8)
    except OSError:
        return None
    finally:
        os.close(fd)
    if len(entries) != count * 8:
        return None
    top = entries[7::8] if sys.byteorder == "little" else entries[::8]
    return top.translate(_DIRTY)


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@lru_cache(maxsize=1)
def _libc_mmap() -> ctypes._CFuncPtr | None:  # type: ignore[name-defined]
    if not _SUPPORTED:
        return None
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    return function
