"""Flow control: what may still be sent on a channel, and what has been received of it.

Both sides account a fragment by the same *cost*: its payload plus a fixed overhead, so that a flood
of tiny messages is bounded as well.  All counters are totals since the session began; a lost or
repeated report of one does no harm.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import anyio

from mlinfra_sdk.errors import ProtocolError
from mlinfra_sdk.link.frames import MAX_PAYLOAD, Buffer, Channel, Header

OVERHEAD = 256
"""What a fragment costs beside its payload, in bytes."""

WINDOWS: dict[Channel, int] = {
    Channel.CONTROL: 4 << 20,
    Channel.JOURNAL: 4 << 20,
    Channel.METRICS: 1 << 20,
    Channel.FORWARD: 4 << 20,
    Channel.BULK: 16 << 20,
}
"""How much a side is ready to hold of each channel before its application takes it, in bytes.

The sender holds as much until the receiver has acknowledged it.  One message larger than the
window passes alone.
"""

FRAGMENT = 256 << 10
"""Largest fragment of a message that is not on the bulk channel, in bytes."""

BULK_FRAGMENT = MAX_PAYLOAD


class Message(NamedTuple):
    """A received message: its bytes, and the stream that the sender gave."""

    data: Buffer
    stream: int


class Outgoing:
    """A message on its way: fragments are cut from ``view`` as they may be sent."""

    __slots__ = ("offset", "size", "stream", "view")

    def __init__(self, view: memoryview, stream: int) -> None:
        self.view = view
        self.stream = stream
        self.size = len(view)
        self.offset = 0


class Outbox:
    """The sending side of a channel."""

    def __init__(self, channel: int, window: int) -> None:
        self.channel = channel
        self.window = window
        self.fragment = BULK_FRAGMENT if channel == Channel.BULK else FRAGMENT
        self.queue: deque[Outgoing] = deque()
        self.admitted = 0
        self.sent = 0
        self.consumed = 0
        self.room = anyio.Event()
        self.turn = anyio.Lock()
        """Held by the sender that waits for room: senders get it in the order they came."""

    def admit(self, message: Outgoing) -> bool:
        """Queue ``message`` if the window has room for it."""
        cost = message.size + OVERHEAD
        if self.admitted - self.consumed + cost > self.window and self.admitted != self.consumed:
            return False
        self.admitted += cost
        self.queue.append(message)
        return True

    def next_fragment(self, largest: int) -> tuple[Outgoing, memoryview] | None:
        """Cut the next fragment if there is one and the receiver has room for it."""
        if not self.queue:
            return None
        message = self.queue[0]
        end = min(message.offset + min(self.fragment, largest), message.size)
        cost = end - message.offset + OVERHEAD
        if self.sent - self.consumed + cost > self.window and self.sent != self.consumed:
            return None
        fragment = message.view[message.offset : end]
        self.sent += cost
        message.offset = end
        if end == message.size:
            self.queue.popleft()
        else:
            self.admitted += OVERHEAD
        return message, fragment

    def was_consumed(self, total: int) -> None:
        """The receiver reports how much it has consumed since the session began."""
        if not self.consumed <= total <= self.sent:
            raise ProtocolError("The other side reports that it consumed what was never sent.")
        if total != self.consumed:
            self.consumed = total
            self.wake()

    def wake(self) -> None:
        """Let the senders that wait for room look again."""
        self.room.set()
        self.room = anyio.Event()


class Inbox:
    """The receiving side of a channel: assembles messages and queues them for the application."""

    def __init__(self, channel: int, window: int) -> None:
        self.channel = channel
        self.window = window
        self.ready: deque[tuple[Message, int]] = deque()
        self.arrived = anyio.Event()
        self.received = 0
        self.consumed = 0
        self._buffer: bytearray | None = None
        self._stream = 0
        self._filled = 0
        self._held = 0
        """Cost of the fragments of the unfinished message that is not reported as consumed."""

    def place(self, header: Header) -> memoryview:
        """Where the payload of the next fragment belongs."""
        if self._buffer is None:
            self._buffer = bytearray(header.size)
            self._stream = header.stream
        end = self._filled + header.length
        if len(self._buffer) != header.size or self._stream != header.stream or end > header.size:
            raise ProtocolError("A fragment does not belong to the message that is under way.")
        return memoryview(self._buffer)[self._filled : end]

    def accept(self, header: Header, payload: memoryview) -> int:
        """Take a fragment; returns the cost that it consumed at once."""
        cost = header.length + OVERHEAD
        held = self.received - self.consumed
        if held and held + cost > self.window:
            raise ProtocolError("The other side sent more than the window allows.")
        self.received += cost
        data: Buffer
        if self._buffer is None and header.length == header.size:
            data = bytes(payload)
        else:
            place = self.place(header)
            assert self._buffer is not None
            if payload.obj is not self._buffer:
                place[:] = payload
            self._filled += header.length
            if self._filled < header.size:
                return self._hold(cost)
            data = self._buffer
            self._buffer = None
            self._filled = 0
        self.ready.append((Message(data, header.stream), self._held + cost))
        self._held = 0
        self.arrived.set()
        return 0

    def take(self) -> tuple[Message, int]:
        """The next message and the cost that taking it consumed; the queue must not be empty."""
        message, cost = self.ready.popleft()
        if not self.ready:
            cost += self._held
            self._held = 0
        self.consumed += cost
        return message, cost

    def _hold(self, cost: int) -> int:
        # The fragments of the message that comes next must not use up the window, or a message
        # larger than the window would never end; those behind an untaken message must.
        self._held += cost
        if self.ready:
            return 0
        cost, self._held = self._held, 0
        self.consumed += cost
        return cost
