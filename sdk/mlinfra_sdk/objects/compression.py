"""Whether a chunk goes over the link compressed: where that is quicker, and only there."""

from __future__ import annotations

import threading
import time

import zstandard

from mlinfra_sdk.objects.store import CHUNK_SIZE

FEATURE = "zstd"
"""What both sides name in the handshake if they take compressed chunks."""

_LEVEL = 1
_LEAST = 512
_SAMPLE = 16 * 1024
_WORTH = 0.85
"""Chunks whose samples do not shrink to this share are sent as they are."""
_MARGIN = 0.5
"""Compression is used on links of at most this share of its own speed."""
_SPEED = 150e6
"""Bytes per second that are compressed by one thread, until that has been measured here."""
_OBSERVED_S = 0.05


class Compressor:
    """Compresses the chunks of one sender while its link is slower than that.

    Until the link's rate is known it is taken for slow.
    """

    def __init__(self) -> None:
        self.rate: float | None = None
        """Bytes per second that the link carries, as far as observed."""
        self.speed = _SPEED
        """Bytes per second that one thread compresses."""
        self._lock = threading.Lock()
        self._since: tuple[float, int, bool] | None = None

    @property
    def wanted(self) -> bool:
        """Whether the link is slow enough."""
        return self.rate is None or self.rate < _MARGIN * self.speed

    def observe(self, given: int, taken: int, now: float) -> None:
        """The link was given so many bytes in all until now, and the other side has taken so many
        of them."""
        busy = given > taken
        if self._since is None:
            self._since = now, taken, busy
            return
        then, before, was_busy = self._since
        if now - then < _OBSERVED_S or taken == before:
            return
        self._since = now, taken, busy
        rate = (taken - before) / (now - then)
        if not (busy and was_busy):  # it waited for us: it may be quicker
            self.rate = max(self.rate or 0.0, rate)
        else:
            self.rate = rate if self.rate is None else (self.rate + rate) / 2

    def rest(self) -> None:
        """Nothing is sent for a while."""
        self._since = None

    def compress(self, chunk: bytes) -> bytes | None:
        """The compressed chunk, or None if it is better sent as it is."""
        if len(chunk) < _LEAST or not self.wanted or not _shrinks(chunk):
            return None
        began = time.thread_time()
        packed = zstandard.ZstdCompressor(level=_LEVEL).compress(chunk)
        took = time.thread_time() - began
        if took > 0:
            with self._lock:
                self.speed += (len(chunk) / took - self.speed) / 8
        return packed if len(packed) < len(chunk) * _WORTH else None


def _shrinks(chunk: bytes) -> bool:
    """By the look of three places in it."""
    if len(chunk) <= 4 * _SAMPLE:
        return True  # as quickly compressed as sampled
    starts = (0, len(chunk) // 2, len(chunk) - _SAMPLE)
    sample = b"".join(chunk[start : start + _SAMPLE] for start in starts)
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(sample)
    return len(packed) < len(sample) * _WORTH


def decompress(data: bytes | bytearray | memoryview) -> bytes:
    """The chunk again. Raises ValueError if this is no compressed chunk."""
    try:
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= CHUNK_SIZE:
            raise ValueError(f"a chunk of {size} bytes")
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
