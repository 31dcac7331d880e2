"""What a session tells about itself, and how patient it is."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from mlinfra_sdk.errors import LinkError


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
