"""A content-addressed chunk store in a directory.

Chunks are files named by their BLAKE3 digest. Several processes may read and write one store at
the same time: a chunk appears by rename, is never modified, and is the same whoever writes it.
Chunks are a cache, so nothing is synced to disk; instead, a file from before the last boot (which a
power failure may have torn) is verified before it counts as present.
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
from mlinfra_sdk.objects.blob import BlobRef

Buffer: TypeAlias = bytes | bytearray | memoryview | PickleBuffer

CHUNK_SIZE = 4 * 1024 * 1024
INLINE_LIMIT = 64 * 1024
# Smaller buffers are read instead of mapped: a process has only some 65000 mappings.
_MAP_LIMIT = 1024 * 1024
_THREADS = min(4, os.cpu_count() or 1)
_TOUCH_AFTER_S = 600
_KEEP_S = 3600


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
        self._booted = _boot_time()

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
            modified = path.stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return False
        if modified < self._booted and not self._verify(digest):
            return False
        if time.time() - modified > _TOUCH_AFTER_S:
            with contextlib.suppress(OSError):
                os.utime(path)
        return True

    def _verify(self, digest: bytes) -> bool:
        try:
            self.read_chunk(digest)
        except StoreError:
            return False
        return True

    def missing(self, digests: Iterable[bytes]) -> list[bytes]:
        """Those of the chunks that are not here, each once."""
        return [digest for digest in dict.fromkeys(digests) if not self.has(digest)]

    def put_chunk(self, data: Buffer, digest: bytes | None = None) -> bytes:
        """Store a chunk and return its digest (which the caller may know already)."""
        digest = chunk_digest(data) if digest is None else digest
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

    def read_chunk(self, digest: bytes) -> bytes:
        """The verified content of a chunk. A corrupt one is removed."""
        path = self._path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise self._missing(digest) from None
        if chunk_digest(data) != digest:
            path.unlink(missing_ok=True)
            raise ChunkCorrupt(
                f"Chunk {digest.hex()} in {self.root} was damaged and has been removed.",
                hint="Run the cell again; the chunk will be sent again.",
            )
        return data

    def _missing(self, digest: bytes) -> ChunkMissing:
        return ChunkMissing(
            f"Chunk {digest.hex()} is not in the store {self.root}.",
            hint="Run the cell again; the chunk will be sent again.",
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

    def collect_garbage(self, limit_bytes: int) -> int:
        """Remove the least recently used chunks until the store has at most ``limit_bytes``.

        Nothing younger than an hour is removed. Returns the number of bytes freed. Mapped regions
        stay valid.
        """
        now = time.time()
        files = sorted(self._files(), key=lambda file: file[1])
        total = sum(size for _, _, size in files)
        freed = 0
        for path, modified, size in files:
            leftover = path.name.startswith(".")
            if now - modified < _KEEP_S or (total - freed <= limit_bytes and not leftover):
                continue
            with contextlib.suppress(OSError):
                path.unlink()
                freed += size
        return freed

    def _files(self) -> Iterator[tuple[Path, float, int]]:
        for directory in self.root.glob("chunks/*"):
            for entry in os.scandir(directory):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    yield Path(entry.path), status.st_mtime, status.st_size


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
