"""References to bytes in a chunk store."""

from __future__ import annotations

import msgspec


class BlobRef(msgspec.Struct, frozen=True, omit_defaults=True):
    """Bytes by content: ``size`` bytes, either ``inline`` or as BLAKE3 digests of its chunks.

    Every chunk but the last has :data:`~mlinfra_sdk.objects.store.CHUNK_SIZE` bytes.
    """

    size: int = 0
    chunks: list[bytes] = []
    inline: bytes | None = None
