"""The server's end of a link: the agent's sessions, each over the wires its client brings."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager

from mlinfra_sdk.link.frames import Channel
from mlinfra_sdk.link.session import LinkSession, Timing
from mlinfra_sdk.link.wire import Wire


class LinkServer:
    """Sessions by id.  Made by `serve`; give each new wire to `handle`."""

    sessions: Mapping[bytes, LinkSession]

    async def handle(self, wire: Wire) -> None:
        """Serve one wire to its end: authenticate, find or make the session, carry its messages.

        Never raises for what the other side does; closes ``wire``.
        """
        raise NotImplementedError


@asynccontextmanager
async def serve(
    secret: bytes,
    on_session: Callable[[LinkSession], Awaitable[None]],
    *,
    timing: Timing | None = None,
    features: Iterable[str] = (),
    info: Mapping[str, str] | None = None,
    windows: Mapping[Channel, int] | None = None,
) -> AsyncIterator[LinkServer]:
    """A server of link sessions; all of them are closed when the block ends.

    ``on_session`` runs once for each session, from its first connection on; the session is closed
    when it returns.  It should return when its ``receive`` iterators end.
    """
    raise NotImplementedError
    yield
