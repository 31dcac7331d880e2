"""What a checkpoint consists of, and its one file.

A manifest names everything by content, so the checkpoint is complete when its manifest and all
chunks are there, and two checkpoints share what they have in common. The file ends in the digest of
what stands before: half a file, or a damaged one, is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec
from blake3 import blake3

from mlinfra_sdk.errors import CheckpointError, RequestError
from mlinfra_sdk.objects.blob import CHUNK_SIZE, BlobRef, Packed

_MAGIC = b"mlinfra checkpoint 1\n"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Part(msgspec.Struct, frozen=True, omit_defaults=True):
    """One entry of a state. ``kind`` says how it was captured (see ``values.py``)."""

    kind: str
    packed: Packed


class File(msgspec.Struct, frozen=True, omit_defaults=True):
    """One file of a watched folder; ``path`` is relative to it, ``mtime`` in nanoseconds."""

    path: str
    size: int
    mtime: int
    content: BlobRef


class Position(msgspec.Struct, frozen=True, array_like=True):
    """How far a loop was: ``done`` items of the ``ordinal``-th loop that began at its depth within
    the enclosing item. ``start`` is the pickled state of the generators when it began."""

    done: int
    ordinal: int = 0
    start: bytes = b""


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True):
    """A checkpoint of ``name``. ``created`` is Unix time; ``number`` counts within the name."""

    name: str
    number: int
    id: str
    """Tells apart what two machines made under one number."""
    created: float
    step: int = 0
    """Items that the outermost loop, or whoever saved, had done."""
    finished: bool = False
    """Whether the loop had come to its end."""
    metrics: dict[str, float] = {}
    parts: dict[str, Part] = {}
    positions: list[Position] = []
    files: list[File] = []
    folder: str = ""
    """The watched folder that ``files`` are of."""

    def blobs(self) -> Iterator[BlobRef]:
        """All content, in order."""
        for part in self.parts.values():
            yield from part.packed.blobs()
        for file in self.files:
            yield file.content

    def chunks(self) -> dict[bytes, int]:
        """Digest and size of all chunks, each once."""
        return {
            digest: min(CHUNK_SIZE, blob.size - index * CHUNK_SIZE)
            for blob in self.blobs()
            for index, digest in enumerate(blob.chunks)
        }

    @property
    def size(self) -> int:
        """Bytes of the whole state, as plain files would have."""
        return sum(blob.size for blob in self.blobs())

    def __str__(self) -> str:
        return f"{self.name} #{self.number} (step {self.step})"


def encode(manifest: Manifest) -> bytes:
    """The content of its file."""
    body = _MAGIC + msgspec.msgpack.encode(manifest)
    return body + blake3(body).digest()


def decode(data: bytes) -> Manifest:
    """Raises :class:`CheckpointError` if this is no whole manifest."""
    body, digest = data[:-32], data[-32:]
    if not body.startswith(_MAGIC) or blake3(body).digest() != digest:
        raise CheckpointError("The checkpoint is damaged or was not written to its end.")
    try:
        return msgspec.msgpack.decode(body[len(_MAGIC) :], type=Manifest)
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"The checkpoint is of another version ({error}).") from None


def check_name(name: str) -> str:
    """Raises :class:`RequestError` for what cannot be the name of checkpoints."""
    if _NAME.fullmatch(name) is None:
        raise RequestError(
            f"{name!r} cannot be the name of checkpoints.",
            hint="Use letters, digits, dots, dashes and underscores, as in 'resnet-50'.",
        )
    return name
