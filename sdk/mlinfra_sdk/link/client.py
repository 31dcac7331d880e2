"""The client's end of a link: connects, and connects again after every cut."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager

from mlinfra_sdk.link.frames import Channel
from mlinfra_sdk.link.session import LinkSession, Status, Timing
from mlinfra_sdk.link.wire import Wire


@asynccontextmanager
async def connect(
    factory: Callable[[], Awaitable[Wire]],
    secret: bytes,
    *,
    timing: Timing | None = None,
    connect_within: float = 30.0,
    on_status: Callable[[Status], None] | None = None,
    features: Iterable[str] = (),
    info: Mapping[str, str] | None = None,
    windows: Mapping[Channel, int] | None = None,
) -> AsyncIterator[LinkSession]:
    """A session with the agent that ``factory``'s wires lead to; closed when the block ends.

    ``factory`` opens a new wire each time it is called (`connect_unix`, `open_relay`).  The first
    connection must succeed within ``connect_within`` seconds; a wrong secret or version fails at
    once.  Later cuts are mended in the background until ``timing.give_up``; ``on_status`` hears of
    every change of state and must return quickly.
    """
    raise NotImplementedError
    yield
