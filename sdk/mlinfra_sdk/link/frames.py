"""Frames: what the bytes on a wire mean (docs/protocol.md is the specification).

A frame is a header of 32 bytes and a payload of at most 1 MiB.  The header carries a check of
itself, so that a length is never believed before it is verified.  Payloads carry a check too,
except on the bulk channel, whose content is verified by its BLAKE3 digest anyway.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeAlias
from zlib import crc32

from mlinfra_sdk.errors import ProtocolError

Buffer: TypeAlias = bytes | bytearray | memoryview

MAGIC = b"\xb5M"
HEADER_BYTES = 32
MAX_PAYLOAD = 1 << 20
MAX_MESSAGE = 64 << 20
MAX_HANDSHAKE = 4096
"""Largest payload of a frame that is not DATA, in bytes."""

_SCRATCH = 256 << 10
_DIRECT = 32 << 10
"""Payloads above this size are received straight into their place instead of the scratch buffer."""

_FIELDS = struct.Struct("!2sBBIIIQI")
_CHECK = struct.Struct("!I")
_HEADER = struct.Struct("!2sBBIIIQII")


class Kind(enum.IntEnum):
    """What a frame is for."""

    HELLO = 1
    WELCOME = 2
    AUTH = 3
    READY = 4
    CLOSE = 5
    PING = 6
    PONG = 7
    ACK = 8
    DATA = 9


class Channel(enum.IntEnum):
    """The streams of a session, most urgent first: a lower channel always goes before a higher."""

    CONTROL = 0
    JOURNAL = 1
    METRICS = 2
    FORWARD = 3
    BULK = 4


CHANNELS = len(Channel)
_BULK = int(Channel.BULK)
_DATA = int(Kind.DATA)
_NUMBERED = (int(Kind.PING), int(Kind.PONG), int(Kind.ACK))
_KINDS = frozenset(int(kind) for kind in Kind)


class Header(NamedTuple):
    """The fields of a frame header; ``check`` is the CRC-32 of the payload (0 on BULK)."""

    kind: int
    channel: int
    length: int
    size: int
    stream: int
    number: int
    check: int


class Frame(NamedTuple):
    """A received frame.  ``payload`` is only valid until more bytes are received."""

    header: Header
    payload: memoryview


Target: TypeAlias = Callable[[Header], "memoryview | None"]
"""Where a large payload shall be received: called once its header is verified.  It may raise
:class:`ProtocolError` to refuse the frame, or return ``None`` to leave the place to the decoder."""


def encode(
    kind: int,
    payload: Buffer = b"",
    *,
    channel: int = 0,
    stream: int = 0,
    number: int = 0,
    size: int = 0,
) -> bytes:
    """The header that goes before ``payload``; ``size`` is the length of DATA's whole message."""
    check = 0 if channel == _BULK else crc32(payload)
    fields = _FIELDS.pack(MAGIC, kind, channel, len(payload), size, stream, number, check)
    return fields + _CHECK.pack(crc32(fields))


def encode_frame(kind: int, payload: Buffer = b"", *, number: int = 0) -> bytes:
    """A whole frame that is not DATA, header and payload."""
    if len(payload) > MAX_HANDSHAKE:
        raise ValueError(f"{len(payload)} bytes are too many for a frame of kind {kind}")
    return encode(kind, payload, number=number) + payload


def decode_header(data: Buffer, offset: int = 0) -> Header:
    """The header at ``offset``; raises :class:`ProtocolError` unless every field is in order."""
    magic, kind, channel, length, size, stream, number, check, own = _HEADER.unpack_from(
        data, offset
    )
    if magic != MAGIC:
        raise _malformed(f"it begins with {magic!r}, not with the magic bytes")
    if crc32(memoryview(data)[offset : offset + _FIELDS.size]) != own:
        raise _malformed("its header does not match its check")
    header = Header(kind, channel, length, size, stream, number, check)
    if kind == _DATA:
        if channel >= CHANNELS:
            raise _malformed(f"channel {channel} does not exist")
        if length > MAX_PAYLOAD or size > MAX_MESSAGE or length > size or (size and not length):
            raise _malformed(f"{length} bytes of a message of {size} are out of bounds")
        if number == 0:
            raise _malformed("DATA has no sequence number")
        if channel == _BULK and check:
            raise _malformed("BULK carries no payload check")
    elif kind not in _KINDS:
        raise _malformed(f"kind {kind} does not exist")
    elif length > MAX_HANDSHAKE:
        raise _malformed(f"{length} bytes are too many for kind {kind}")
    elif channel or size or stream or (number and kind not in _NUMBERED):
        raise _malformed(f"kind {kind} has fields that belong to DATA")
    return header


def _malformed(what: str) -> ProtocolError:
    return ProtocolError(
        f"A malformed frame arrived: {what}.",
        hint="Something wrote into the connection, or the other side is not mlinfra.",
    )


class Decoder:
    """Turns received bytes into frames, with bounded memory and without copying large payloads.

    Fill :meth:`space` (or a part of it) with received bytes, then iterate over
    ``received(count)`` to its end.  After a :class:`ProtocolError` the decoder is of no use.
    """

    def __init__(self, target: Target | None = None) -> None:
        self.target = target
        self._scratch = bytearray(_SCRATCH)
        self._view = memoryview(self._scratch)
        self._start = 0
        self._end = 0
        self._header: Header | None = None
        self._direct: memoryview | None = None
        self._filled = 0

    @property
    def direct(self) -> bool:
        """Whether all of :meth:`space` belongs to one payload, which has to be complete first."""
        return self._direct is not None

    def space(self) -> memoryview:
        """Where the next received bytes belong; never empty."""
        if self._direct is not None:
            return self._direct[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start >= _SCRATCH // 2:
            rest = self._end - self._start
            self._scratch[:rest] = self._scratch[self._start : self._end]
            self._start, self._end = 0, rest
        return self._view[self._end :]

    def received(self, count: int) -> Iterator[Frame]:
        """The frames that are complete now that ``count`` bytes have been put into `space()`."""
        if self._direct is not None:
            self._filled += count
            if self._filled == self._header.length:  # type: ignore[union-attr]
                yield self._finish(self._direct)
            return
        self._end += count
        while True:
            header = self._header
            if header is None:
                if self._end - self._start < HEADER_BYTES:
                    return
                header = decode_header(self._scratch, self._start)
                self._start += HEADER_BYTES
                self._header = header
            have = self._end - self._start
            if header.length > _DIRECT and have < header.length:
                self._receive_directly(header, have)
                return
            if have < header.length:
                return
            payload = self._view[self._start : self._start + header.length]
            self._start += header.length
            yield self._finish(payload)

    def feed(self, data: Buffer) -> Iterator[Frame]:
        """The frames that ``data`` completes (for bytes that are at hand already)."""
        rest = memoryview(data)
        while rest:
            space = self.space()
            count = min(len(space), len(rest))
            space[:count] = rest[:count]
            rest = rest[count:]
            yield from self.received(count)

    def _receive_directly(self, header: Header, have: int) -> None:
        place = self.target(header) if self.target else None
        if place is None:
            place = memoryview(bytearray(header.length))
        place[:have] = self._view[self._start : self._end]
        self._start = self._end = 0
        self._direct = place
        self._filled = have

    def _finish(self, payload: memoryview) -> Frame:
        header = self._header
        assert header is not None
        self._header = self._direct = None
        if header.channel != _BULK and crc32(payload) != header.check:
            raise _malformed("its payload does not match its check")
        return Frame(header, payload)


def split(size: int, limit: int) -> Sequence[tuple[int, int]]:
    """The (start, end) of each fragment of a message of ``size`` bytes."""
    if size <= limit:
        return ((0, size),)
    return [(start, min(start + limit, size)) for start in range(0, size, limit)]
