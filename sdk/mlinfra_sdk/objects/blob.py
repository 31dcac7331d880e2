"""References to bytes and to pickled graphs in a chunk store."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

CHUNK_SIZE = 4 * 1024 * 1024


class BlobRef(msgspec.Struct, frozen=True, omit_defaults=True):
    """Bytes by content: ``size`` bytes, either ``inline`` or as BLAKE3 digests of its chunks.

    Every chunk but the last has :data:`CHUNK_SIZE` bytes.
    """

    size: int = 0
    chunks: list[bytes] = []
    inline: bytes | None = None


class Source(msgspec.Struct, frozen=True, array_like=True):
    """Text of a notebook cell, so that tracebacks and ``inspect.getsource`` work over there."""

    filename: str
    text: str
    count: int | None = None


class Packed(msgspec.Struct, frozen=True, omit_defaults=True):
    """One pickled object graph: its stream and its out-of-band buffers, by content."""

    stream: BlobRef
    buffers: list[BlobRef] = []
    sources: list[Source] = []

    def blobs(self) -> Iterator[BlobRef]:
        """The stream and the buffers."""
        yield self.stream
        yield from self.buffers

    def chunks(self) -> Iterator[tuple[bytes, int]]:
        """Digests and sizes of all chunks, in order, with repetitions."""
        for blob in self.blobs():
            for index, digest in enumerate(blob.chunks):
                yield digest, min(CHUNK_SIZE, blob.size - index * CHUNK_SIZE)
