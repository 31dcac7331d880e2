"""Files that come piece by piece: each lies in a folder beside the chunks until it is complete.

A piece of such a file is written once, into its place, instead of as a chunk that is read and
copied later. A file is named by the digest of its content, so what came before an interrupt is
found again: the pieces that lie in it are recognised by reading them; what is a hole has not come.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import stat
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3

Buffer = bytes | bytearray | memoryview

_THREADS = min(4, os.cpu_count() or 1)
_COPIED = 1 << 20


class Part:
    """A file of ``size`` bytes in pieces of ``length`` bytes each (the last one may be shorter),
    of which some are there. :attr:`fd` is open and locked until :meth:`close`."""

    def __init__(
        self, path: Path, fd: int, pieces: Sequence[bytes], size: int, length: int
    ) -> None:
        self.path = path
        self.fd = fd
        self.have: set[bytes] = set()
        """Digests of the pieces that are in their places."""
        self._size = size
        self._length = length
        self._places: dict[bytes, list[int]] = {}
        for index, digest in enumerate(pieces):
            self._places.setdefault(digest, []).append(index)
        self._lock = threading.Lock()
        self._closed = False

    @property
    def wanted(self) -> Iterable[bytes]:
        """The digests of all pieces."""
        return self._places.keys()

    def put(self, digest: bytes, data: Buffer) -> bool:
        """Write a piece of this digest into all its places; False if it has none, or is too late.
        Raises OSError."""
        places = self._places.get(digest, ())
        with self._lock:
            if self._closed or not places:
                return False
            if digest not in self.have:
                for index in places:
                    if len(data) != self._extent(index):
                        return False
                    rest, offset = memoryview(data).cast("B"), index * self._length
                    while rest:
                        count = os.pwrite(self.fd, rest, offset)
                        rest, offset = rest[count:], offset + count
                self.have.add(digest)
        return True

    def read(self, digest: bytes) -> bytes | None:
        """A piece that is there, verified."""
        with self._lock:
            if self._closed or digest not in self.have:
                return None
            data = self._read(self._places[digest][0])
        return data if blake3(data).digest() == digest else None

    def move(self, fd: int, name: bytes | str | Path, folder: int | None = None) -> None:
        """Have the file, which is complete, take the place of the empty one that is open as ``fd``
        and called ``name`` (in ``folder``), with its permissions: ``fd`` is a descriptor
        of it then. Raises OSError."""
        os.fchmod(self.fd, stat.S_IMODE(os.fstat(fd).st_mode))
        try:
            os.rename(self.path, name, dst_dir_fd=folder)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            os.ftruncate(fd, self._size)
            for index in itertools.chain.from_iterable(self._places.values()):
                if self._any_data(index):
                    copy_range(self.fd, fd, index * self._length, self._extent(index))
            self.path.unlink(missing_ok=True)
        else:
            os.dup2(self.fd, fd, inheritable=False)

    def close(self) -> None:
        """Take nothing more. The file stays where it is."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self.fd)

    def look(self, older: Path | None) -> None:
        """Find out what is there already; if nothing, begin with what is in ``older``. Raises
        OSError."""
        size = os.fstat(self.fd).st_size
        os.ftruncate(self.fd, self._size)
        if not size and older is not None:
            with older.open("rb") as file:
                size = min(self._size, os.fstat(file.fileno()).st_size)
                copy_range(file.fileno(), self.fd, 0, size)
        if not size:
            return

        def there(digest: bytes) -> bool:
            return all(
                self._any_data(index) and blake3(self._read(index)).digest() == digest
                for index in self._places[digest]
            )

        with ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(there, self._places)
            self.have = {
                digest for digest, is_there in zip(self._places, found, strict=True) if is_there
            }

    def _any_data(self, index: int) -> bool:
        start = index * self._length
        with contextlib.suppress(OSError, AttributeError):  # the rest of the file is one hole
            return os.lseek(self.fd, start, os.SEEK_DATA) < start + self._extent(index)
        return not hasattr(os, "SEEK_DATA")

    def _extent(self, index: int) -> int:
        return min(self._length, self._size - index * self._length)

    def _read(self, index: int) -> bytes:
        return os.pread(self.fd, self._extent(index), index * self._length)


def copy_range(source: int, target: int, offset: int, length: int) -> None:
    """Copy bytes of a file to the same place of another one, by the kernel where it can do that;
    it shares the blocks where the file system can. Raises OSError."""
    with contextlib.suppress(OSError, AttributeError):  # not between all file systems
        while length:
            count = os.copy_file_range(source, target, length, offset, offset)
            if not count:
                break
            offset, length = offset + count, length - count
    while length:
        data = os.pread(source, min(length, _COPIED), offset)
        if not data:
            raise OSError(errno.EIO, "it has become shorter")
        written = os.pwrite(target, data, offset)
        offset, length = offset + written, length - written


class Parts:
    """The files below ``folder`` that this process is putting together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[bytes, Part] = {}
        self._wanted: dict[bytes, list[Part]] = {}
        """The files that each piece belongs to."""
        self._lock = threading.Lock()

    def open(
        self,
        digest: bytes,
        pieces: Sequence[bytes],
        size: int,
        length: int,
        older: Path | None = None,
    ) -> bool:
        """From now on put pieces into the file whose content has this digest, and go on where it
        was left, or with what is alike in an ``older`` one. False if the pieces do not make up the
        size, or it is being put together already: here, or by another process."""
        if digest in self._open or not (len(pieces) - 1) * length < size <= len(pieces) * length:
            return False
        part = self._locked(digest, pieces, size, length, older)
        if part is None:
            return False
        with self._lock:
            self._open[digest] = part
            for piece in part.wanted:
                self._wanted[piece] = [*self._wanted.get(piece, ()), part]
        return True

    def _locked(
        self,
        digest: bytes,
        pieces: Sequence[bytes],
        size: int,
        length: int,
        older: Path | None,
    ) -> Part | None:
        path = self.folder / digest.hex()
        part = None
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            part = Part(path, os.open(path, flags, 0o600), pieces, size, length)
            fcntl.flock(part.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(part.fd).st_ino != path.stat().st_ino:
                raise FileExistsError  # another process has just moved it to its place
            part.look(older)
        except OSError:  # also where files cannot be locked: chunks do as well
            if part is not None:
                part.close()
            return None
        return part

    def put(self, digest: bytes, data: Buffer) -> bool:
        """Give a piece to all files that it belongs to; False if there is none. Raises OSError."""
        return any([part.put(digest, data) for part in self._wanted.get(digest, ())])

    def has(self, digest: bytes) -> bool:
        """Whether a piece is in one of the files."""
        return any(digest in part.have for part in self._wanted.get(digest, ()))

    def read(self, digest: bytes) -> bytes | None:
        """A piece of one of the files."""
        return next(filter(None, (it.read(digest) for it in self._wanted.get(digest, ()))), None)

    def take(self, digest: bytes) -> Part | None:
        """The file whose content has this digest, which the caller completes, moves and closes."""
        with self._lock:
            part = self._open.pop(digest, None)
            if part is not None:
                for piece in part.wanted:
                    owners = [it for it in self._wanted[piece] if it is not part]
                    if owners:
                        self._wanted[piece] = owners
                    else:
                        del self._wanted[piece]
        return part

    def close(self, digest: bytes) -> None:
        """Put this file together no more; what has come of it stays for later."""
        part = self.take(digest)
        if part is not None:
            part.close()
