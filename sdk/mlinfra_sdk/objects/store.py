"""A content-addressed chunk store in a directory.

Chunks are files named by their BLAKE3 digest. Several processes may read and write one store at
the same time: a chunk appears by rename, is never modified, and is the same whoever writes it.
Chunks are a cache, so nothing is synced to disk. Instead a chunk is verified before it counts as
present, unless that was done not long ago: its file's modification time says when it was last known
to be right, and below the second it is a *seal* made of the digest. A file that anything else has
written to does not bear the seal; one from before the last boot (which a power failure may have
torn) and one that was not verified for an hour are too old. The access time says when the chunk was
last used.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import PickleBuffer
from typing import TypeAlias

from blake3 import blake3

from mlinfra_sdk.errors import ChunkCorrupt, ChunkMissing, StoreError
from mlinfra_sdk.objects import regions
from mlinfra_sdk.objects.blob import CHUNK_SIZE as CHUNK_SIZE
from mlinfra_sdk.objects.blob import BlobRef
from mlinfra_sdk.objects.parts import Parts

Buffer: TypeAlias = bytes | bytearray | memoryview | PickleBuffer

INLINE_LIMIT = 64 * 1024
# Smaller buffers are read instead of mapped: a process has only some 65000 mappings.
_MAP_LIMIT = 1024 * 1024
_THREADS = min(4, os.cpu_count() or 1)
_TOUCH_AFTER_S = 600
_TRUST_S = 3600
"""For so long a chunk that was verified is taken to be right."""
_KEEP_S = 3600
"""A chunk that was used since is not removed."""
_SECOND = 10**9
_DAMAGED = -1
_QUICK_S = 0.003
"""A look at all mapped files that takes no longer is taken before each cell."""


def chunk_digest(data: Buffer) -> bytes:
    """The name of a chunk."""
    return blake3(data).digest()


class ChunkStore:
    """The store in directory ``root``. Equal :attr:`id` means the same store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.id = self._read_id()
        except OSError as error:
            raise self._unwritable(error) from error
        self.parts = Parts(root / "parts")
        """Files whose pieces go straight into them instead of into chunks."""
        self._booted = _boot_time()
        self._check_after = 0.0

    def _read_id(self) -> str:
        path = self.root / "id"
        if not path.exists():
            temporary = self.root / f".id-{secrets.token_hex(8)}"
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(16))
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)  # unlike rename this lets the first writer win
            temporary.unlink()
        return path.read_text()

    def _path(self, digest: bytes) -> Path:
        name = digest.hex()
        return self.root / "chunks" / name[:2] / name

    # Chunks

    def has(self, digest: bytes) -> bool:
        """Whether the chunk is here and usable; marks it as recently used."""
        path = self._path(digest)
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return self.parts.has(digest)
        now = time.time()
        if not self._trusted(status, digest, now):
            return self._verify(digest)
        if now - status.st_atime > _TOUCH_AFTER_S:
            with contextlib.suppress(OSError):
                os.utime(path, ns=(int(now * _SECOND), status.st_mtime_ns))
        return True

    def size(self, digest: bytes) -> int:
        """The chunk's number of bytes; 0 if it is not here."""
        try:
            return self._path(digest).stat().st_size
        except OSError:
            return 0

    def _trusted(self, status: os.stat_result, digest: bytes, now: float) -> bool:
        """Whether the chunk was verified (or written) not long ago, and nothing has written to it
        since."""
        sealed = status.st_mtime_ns % _SECOND == _seal(digest)
        return sealed and max(self._booted, now - _TRUST_S) <= status.st_mtime <= now + 1

    def check_mapped(self) -> None:
        """Raises :class:`ChunkCorrupt` if memory of this process is mapped from a chunk's file that
        has been damaged since. Looks at each file, and hashes the memory only where the file is
        not what it was; if there are many, this takes at most a hundredth of the time."""
        began = time.thread_time()
        if time.monotonic() < self._check_after:
            return
        for region in regions.mapped():
            for index, digest in enumerate(region.digests):
                file = self._sealed_file(digest)
                if region.files[index] in (file, _DAMAGED):
                    continue
                region.files[index] = file
                content = region.unwritten(index)
                paused = time.thread_time()
                damaged = content is not None and chunk_digest(content) != digest
                began += time.thread_time() - paused  # once only: it says nothing of the next look
                if damaged:
                    region.files[index] = _DAMAGED  # told once: what is sent again replaces it
                    self._verify(digest)
                    raise self._corrupt(digest)
        took = time.thread_time() - began
        if took > _QUICK_S:
            self._check_after = time.monotonic() + 100 * took

    def _sealed_file(self, digest: bytes) -> int:
        """The number of the chunk's file; 0 if nothing is known of what is in it."""
        try:
            status = self._path(digest).stat()
        except OSError:
            return 0
        return status.st_ino if status.st_mtime_ns % _SECOND == _seal(digest) else 0

    def _verify(self, digest: bytes) -> bool:
        try:
            self.read_chunk(digest)
        except StoreError:
            return False
        self._renew(digest)
        return True

    def _renew(self, digest: bytes) -> None:
        """It was verified just now."""
        with contextlib.suppress(OSError):
            os.utime(self._path(digest), ns=_times(digest))

    def missing(self, digests: Iterable[bytes]) -> list[bytes]:
        """Those of the chunks that are not here, each once."""
        return [digest for digest in dict.fromkeys(digests) if not self.has(digest)]

    def put_chunk(self, data: Buffer, digest: bytes | None = None) -> bytes:
        """Store a chunk and return its digest (which the caller may know already)."""
        digest = chunk_digest(data) if digest is None else digest
        try:
            if self.parts.put(digest, _flat(data)):
                return digest
        except OSError as error:
            raise self._unwritable(error) from error
        if self.has(digest):
            return digest
        path = self._path(digest)
        temporary = path.parent / f".{secrets.token_hex(8)}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o400)
            try:
                rest = memoryview(data).cast("B")
                while rest:
                    rest = rest[os.write(fd, rest) :]
                os.utime(fd, ns=_times(digest))
            finally:
                os.close(fd)
            os.replace(temporary, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if isinstance(error, OSError):
                raise self._unwritable(error) from error
            raise
        return digest

    def _unwritable(self, error: OSError) -> StoreError:
        return StoreError(
            f"The chunk store {self.root} cannot be written: {error.strerror}.",
            hint="Free some disk space or set MLINFRA_HOME to another disk.",
        )

    def read_chunk(self, digest: bytes, *, verify: bool = True) -> bytes:
        """The content of a chunk, verified unless someone else is going to. A corrupt one is
        removed."""
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            part = self.parts.read(digest)
            if part is None:
                raise self._missing(digest) from None
            return part
        except OSError as error:  # a bad block, say
            raise StoreError(
                f"Chunk {digest.hex()} in {self.root} cannot be read: {error.strerror}."
            ) from error
        if verify and chunk_digest(data) != digest:
            path.unlink(missing_ok=True)
            raise self._corrupt(digest)
        return data

    def _corrupt(self, digest: bytes) -> ChunkCorrupt:
        return ChunkCorrupt(
            f"Chunk {digest.hex()} in {self.root} was damaged and has been removed.",
            hint="It is made or sent again with the next run that needs it.",
        )

    def discard(self, digests: Iterable[bytes]) -> None:
        """Remove chunks that nobody is going to need again, unless a run does."""
        pinned = self._pinned()
        for digest in digests:
            if digest.hex() not in pinned:
                with contextlib.suppress(OSError):
                    self._path(digest).unlink()

    def _missing(self, digest: bytes) -> ChunkMissing:
        return ChunkMissing(
            f"Chunk {digest.hex()} is not in the store {self.root}.",
            hint="It is made or sent again with the next run that needs it.",
        )

    # Buffers

    def put_buffer(self, buffer: Buffer, known: BlobRef | None = None) -> BlobRef:
        """Store the bytes of a buffer and refer to them.

        Chunks of a mapped region that were not written since are recognised without hashing.
        ``known`` is what :meth:`digest_buffer` said of the same bytes just before.
        """
        return self._refer(buffer, known, write=True)

    def digest_buffer(self, buffer: Buffer) -> BlobRef:
        """What :meth:`put_buffer` would return, without storing anything."""
        return self._refer(buffer, None, write=False)

    def _refer(self, buffer: Buffer, known: BlobRef | None, *, write: bool) -> BlobRef:
        view = _flat(buffer)
        if view.nbytes < INLINE_LIMIT:
            return BlobRef(view.nbytes, inline=view.tobytes())
        offsets = range(0, view.nbytes, CHUNK_SIZE)
        clean: Sequence[bytes | None] | None
        clean = known.chunks if known is not None else regions.clean_digests(view, CHUNK_SIZE)
        clean = clean or [None] * len(offsets)

        def refer(offset: int, digest: bytes | None) -> bytes:
            chunk = view[offset : offset + CHUNK_SIZE]
            digest = chunk_digest(chunk) if digest is None else digest
            return self.put_chunk(chunk, digest) if write else digest

        if len(offsets) == 1 or (not write and None not in clean):
            return BlobRef(view.nbytes, list(map(refer, offsets, clean)))
        with ThreadPoolExecutor(_THREADS) as pool:
            return BlobRef(view.nbytes, list(pool.map(refer, offsets, clean)))

    def unchanged_bytes(self, buffer: Buffer) -> int:
        """How many bytes of a buffer are known to be unchanged since they were mapped."""
        view = _flat(buffer)
        clean = regions.clean_digests(view, CHUNK_SIZE)
        if not clean:
            return 0
        sizes = (min(CHUNK_SIZE, view.nbytes - i * CHUNK_SIZE) for i in range(len(clean)))
        return sum(size for size, digest in zip(sizes, clean, strict=True) if digest is not None)

    def map(self, ref: BlobRef) -> memoryview:
        """A writable view of the content; writes stay in this process. Large content is mapped,
        not read. All chunks must be here."""
        if ref.inline is not None:
            return memoryview(bytearray(ref.inline))
        for digest in ref.chunks:
            if not self.has(digest):
                raise self._missing(digest)
        if ref.size >= _MAP_LIMIT:
            paths = [self._path(digest) for digest in ref.chunks]
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile: reading says which
                view = regions.map_chunks(paths, ref.size, CHUNK_SIZE, ref.chunks)
                if view is not None:
                    return view
        return memoryview(self.read(ref))

    def read(self, ref: BlobRef) -> bytearray:
        """The verified content as a new bytearray."""
        if ref.inline is not None:
            return bytearray(ref.inline)
        content = bytearray(ref.size)
        for index, digest in enumerate(ref.chunks):
            chunk = self.read_chunk(digest)
            content[index * CHUNK_SIZE : index * CHUNK_SIZE + len(chunk)] = chunk
        return content

    # Housekeeping

    def pin(self, name: str, digests: Iterable[bytes], owner: Path) -> None:
        """Keep chunks, however long they are not used, until :meth:`unpin` or until ``owner``, a
        file or folder, is gone."""
        folder = self.root / "pins"
        temporary = folder / f".{secrets.token_hex(8)}"
        content = b"\0".join((os.fsencode(owner.absolute()), b"".join(digests)))
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            with open(
                os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
            ) as file:
                file.write(content)
            os.replace(temporary, folder / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise self._unwritable(error) from error

    def unpin(self, name: str) -> None:
        """Let go of what was pinned by this name."""
        (self.root / "pins" / name).unlink(missing_ok=True)

    def pins(self, prefix: str) -> list[str]:
        """Names of pins that begin so."""
        return [path.name for path in self.root.glob("pins/*") if path.name.startswith(prefix)]

    def secure(self, digests: Iterable[bytes]) -> None:
        """Have chunks that are here synced to disk, so that a power failure does not lose them.
        Raises :class:`StoreError`."""
        found = [self._path(digest) for digest in digests]
        folders = {path.parent for path in found}
        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(_sync, found))
                list(pool.map(_sync, [*folders, self.root / "chunks"] if folders else []))
        except OSError as error:
            raise self._unwritable(error) from error

    def _pinned(self) -> set[str]:
        names: set[str] = set()
        for path in self.root.glob("pins/*"):
            with contextlib.suppress(OSError):
                owner, _, digests = path.read_bytes().partition(b"\0")
                if not os.path.lexists(owner):
                    path.unlink()
                    continue
                names.update(digests[i : i + 32].hex() for i in range(0, len(digests), 32))
        return names

    def collect_garbage(self, limit_bytes: int, least_free: float = 0.0) -> int:
        """Remove the least recently used chunks until the store has at most ``limit_bytes`` and
        the share ``least_free`` of its disk is free.

        What is pinned stays, and what was used within an hour. Returns the number of bytes freed.
        Mapped regions stay valid.
        """
        now = time.time()
        files = sorted(self._files(), key=lambda file: file[1])
        total = sum(size for _, _, size in files)
        excess = total - limit_bytes
        with contextlib.suppress(OSError):
            disk = os.statvfs(self.root)
            short = least_free * disk.f_blocks * disk.f_frsize - disk.f_bavail * disk.f_frsize
            excess = max(excess, int(short))
        pinned = self._pinned()
        freed = 0
        for path, used, size in files:
            leftover = path.name.startswith(".")
            if now - used < _KEEP_S or (not leftover and (freed >= excess or path.name in pinned)):
                continue
            with contextlib.suppress(OSError):
                path.unlink()
                freed += size
        return freed

    def disk_size(self) -> int:
        """Bytes of the whole disk that the store lies on."""
        disk = os.statvfs(self.root)
        return disk.f_blocks * disk.f_frsize

    def _files(self) -> Iterator[tuple[Path, float, int]]:
        for directory in (*self.root.glob("chunks/*"), *self.root.glob("parts")):
            for entry in os.scandir(directory):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    used = max(status.st_atime, status.st_mtime)
                    size = status.st_size
                    if directory.name == "parts":
                        size = min(size, status.st_blocks * 512)  # what has not come is a hole
                    yield Path(entry.path), used, size


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _seal(digest: bytes) -> int:
    """Nanoseconds of the modification time of a chunk's file, in whole microseconds: not every
    file system keeps more."""
    return int.from_bytes(digest[:4], "big") % 10**6 * 1000


def _times(digest: bytes) -> tuple[int, int]:
    """Access and modification time of a chunk that is used and right just now."""
    now = time.time_ns()
    return now, now // _SECOND * _SECOND + _seal(digest)


def _flat(buffer: Buffer) -> memoryview:
    """The buffer's memory as bytes (Fortran order allowed for a PickleBuffer)."""
    if isinstance(buffer, PickleBuffer):
        return buffer.raw()
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")


def _boot_time() -> float:
    """Seconds since the epoch; infinity (verify everything) where the system does not tell."""
    try:
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    except (AttributeError, OSError):
        return float("inf")
