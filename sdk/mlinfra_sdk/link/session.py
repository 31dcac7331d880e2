"""The session: ordered, exactly-once messages on prioritised channels, over one wire after another.

`LinkSession` is what both ends share.  It numbers every frame of data when it is first put on a
wire, keeps it until the other side acknowledges it, and sends everything that is not acknowledged
again on the next wire; the receiver accepts each number once.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import anyio
import msgspec

from mlinfra_sdk.errors import LinkClosed, LinkError, ProtocolError
from mlinfra_sdk.link.flow import WINDOWS, Inbox, Message, Outbox, Outgoing
from mlinfra_sdk.link.frames import (
    MAX_MESSAGE,
    Buffer,
    Channel,
    Decoder,
    Frame,
    Header,
    Kind,
    encode,
    encode_frame,
)
from mlinfra_sdk.link.handshake import Peer, Resume, closed, closing, unpack
from mlinfra_sdk.link.wire import Wire

_DATA = int(Kind.DATA)
_BATCH = 256 << 10
_BATCH_BUFFERS = 256
_SMALL = 4 << 10
_ACK_FRAMES = 64
_ACK_COST = 256 << 10


@dataclass(frozen=True)
class Timing:
    """How patient a link is, in seconds."""

    heartbeat: float = 5.0
    """A ping is sent this often."""
    dead_after: float = 15.0
    """A wire on which no byte arrives for so long is given up."""
    handshake: float = 20.0
    """Limit of one attempt to connect, login and handshake together."""
    ack_delay: float = 0.02
    """What was received is acknowledged at the latest after this."""
    retry_min: float = 0.02
    retry_max: float = 1.0
    """Pause between attempts to connect again: doubles from the first to the second."""
    give_up: float = 600.0
    """A client that cannot connect again for so long closes its session."""
    retention: float = 600.0
    """A server keeps a session whose client is away for so long."""


class State(enum.Enum):
    """Whether messages can pass right now."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    RECONNECTING = "reconnecting"
    CLOSED = "closed"


@dataclass(frozen=True)
class Status:
    """The state of a session, since when (Unix time), and the error that led to it, if any."""

    state: State
    since: float
    error: LinkError | None = None


@dataclass
class Counters:
    """What has passed over a session's wires, headers and repeats included, and its round trip."""

    bytes_sent: int = 0
    bytes_received: int = 0
    wires: int = 0
    repeated_frames: int = 0
    round_trip: float = 0.0
    """Latest measured round trip of a ping, in seconds."""


class LinkSession:
    """One end of a link.  Get one from `client.connect` or from `server.LinkServer`.

    Use it in the event loop that it was made in; it is not thread-safe.
    """

    def __init__(
        self,
        session_id: bytes,
        *,
        timing: Timing,
        windows: dict[Channel, int] | None = None,
        on_status: Callable[[Status], None] | None = None,
    ) -> None:
        self.id = session_id
        self.timing = timing
        self.status = Status(State.CONNECTING, time.time())
        self.counters = Counters()
        self.peer: Peer | None = None
        self.on_status = on_status
        self.windows = [(windows or WINDOWS)[channel] for channel in Channel]
        # What may be sent is the other side's to say, at the first handshake.
        self._outboxes = [Outbox(channel, 0) for channel in Channel]
        self._inboxes = [Inbox(channel, self.windows[channel]) for channel in Channel]
        self._number = 0
        self._received = 0
        self._unacked: deque[tuple[int, tuple[Buffer, ...]]] = deque()
        self._repeat: deque[tuple[int, tuple[Buffer, ...]]] = deque()
        self._urgent: list[bytes] = []
        self._wake = anyio.Event()
        self._ack_started = anyio.Event()
        self._ack_now = False
        self._ack_frames = 0
        self._ack_cost = 0
        self._heard = True
        self._farewell: bytes | None = None
        self._ended = anyio.Event()
        self._settled = anyio.Event()
        self._scope: anyio.CancelScope | None = None
        self._driving = anyio.Lock()

    # -- what the application uses ----------------------------------------------------------

    def send_nowait(self, channel: Channel, data: Buffer, stream: int = 0) -> bool:
        """Queue a message; ``False`` if the channel's window has no room (then use `send`).

        Read-only buffers are not copied: they must keep their content until the other side has
        acknowledged them.  Raises :class:`LinkClosed` on a closed session.
        """
        outbox = self._outboxes[channel]
        if outbox.turn.locked():
            self._check_open()
            return False
        return self._admit(outbox, data, stream)

    async def send(self, channel: Channel, data: Buffer, stream: int = 0) -> None:
        """Queue a message, waiting while the channel's window has no room.

        ``stream`` (0 to 2**32-1) travels with the message.  A message has at most 64 MiB.  While
        the link reconnects, the window fills up and then this waits.
        """
        raise NotImplementedError

    def receive(self, channel: Channel) -> AsyncIterator[Message]:
        """The messages of a channel, in order; ends when the session is closed in good order.

        Raises :class:`LinkClosed` when the session was lost.  What is not taken from here holds
        the sender back.
        """
        raise NotImplementedError

    def receive_nowait(self, channel: Channel) -> Message | None:
        """The next message of a channel if there is one."""
        raise NotImplementedError

    async def flush(self) -> None:
        """Wait until the other side has received everything that was sent so far."""
        raise NotImplementedError

    async def aclose(self, *, patience: float = 2.0) -> None:
        """End the session on both sides, after a flush that lasts at most ``patience`` seconds."""
        raise NotImplementedError

    async def wait_closed(self) -> None:
        """Wait until the session is closed, by whomever."""
        await self._ended.wait()
