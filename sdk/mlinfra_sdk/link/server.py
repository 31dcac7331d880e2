"""The server's end of a link: the agent's sessions, each over the wires its client brings."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import anyio
from anyio.abc import TaskGroup

from mlinfra_sdk.errors import (
    AuthenticationError,
    LinkClosed,
    LinkError,
    ProtocolError,
    VersionMismatch,
)
from mlinfra_sdk.link.flow import WINDOWS
from mlinfra_sdk.link.frames import Channel
from mlinfra_sdk.link.handshake import Hello, admit, closing
from mlinfra_sdk.link.session import LinkSession
from mlinfra_sdk.link.state import State, Timing
from mlinfra_sdk.link.wire import Wire

logger = logging.getLogger(__name__)

_CODES: tuple[tuple[type[LinkError], str], ...] = (
    (AuthenticationError, "authentication"),
    (VersionMismatch, "version"),
    (LinkClosed, "session"),
    (ProtocolError, "protocol"),
)


@dataclass
class _Entry:
    session: LinkSession
    attempt: int = 0
    away: float = 0.0


class LinkServer:
    """Sessions by id.  Made by `serve`; give each new wire to `handle`."""

    def __init__(
        self,
        secret: bytes,
        on_session: Callable[[LinkSession], Awaitable[None]],
        timing: Timing,
        features: Iterable[str],
        info: Mapping[str, str],
        windows: Mapping[Channel, int],
        tasks: TaskGroup,
    ) -> None:
        self._secret = secret
        self._on_session = on_session
        self._timing = timing
        self._features = frozenset(features)
        self._info = info
        self._windows = windows
        self._tasks = tasks
        self._entries: dict[bytes, _Entry] = {}

    @property
    def sessions(self) -> list[LinkSession]:
        """The sessions that are not closed, also those whose client is away."""
        return [entry.session for entry in self._entries.values()]

    async def handle(self, wire: Wire) -> None:
        """Serve one wire to its end: authenticate, find or make the session, carry its messages.

        Never raises for what the other side does; closes ``wire``.
        """
        try:
            await self._serve_wire(wire)
        except TimeoutError:
            logger.info("A client did not finish its handshake")
        except LinkError as error:
            logger.info("A client was turned away: %s", error)
            await _dismiss(wire, error)
        except Exception:
            # Whatever a client sends must not end the agent and all other sessions.
            logger.exception("A client's connection failed")
        finally:
            with anyio.CancelScope(shield=True):
                await wire.aclose()

    async def _serve_wire(self, wire: Wire) -> None:
        with anyio.fail_after(self._timing.handshake):
            decoder, hello, peer, point = await admit(
                wire,
                self._secret,
                windows=[self._windows[channel] for channel in Channel],
                features=self._features,
                info=self._info,
            )
        entry = self._entry(hello)
        if hello.attempt <= entry.attempt:
            raise LinkError("The client has a newer connection.")
        entry.attempt = hello.attempt
        fault = await entry.session.drive(
            wire, decoder, peer, point, current=lambda: entry.attempt == hello.attempt, greet=True
        )
        logger.info("A client's connection ended: %s", fault)

    def _entry(self, hello: Hello) -> _Entry:
        entry = self._entries.get(hello.session)
        if entry is None:
            if hello.resume:
                raise LinkClosed(
                    "The agent does not know this session any more.",
                    hint="It was started anew or the client was away for too long; "
                    "attach to the run with a new session.",
                )
            session = LinkSession(hello.session, timing=self._timing, windows=self._windows)
            entry = self._entries[hello.session] = _Entry(session)
            self._tasks.start_soon(self._run, session)
        return entry

    async def _run(self, session: LinkSession) -> None:
        await session.wait_connected()
        try:
            with suppress(LinkClosed):
                await self._on_session(session)
            await session.aclose()
        except Exception:
            logger.exception("A session failed")
            await session.aclose(LinkClosed("The agent failed in this session; its log says why."))
        finally:
            session.finish(None)
            del self._entries[session.id]

    async def sweep(self) -> None:
        """Close the sessions whose client does not come back, for ever."""
        tick = min(1.0, self._timing.retention / 4)
        while True:
            # Counted in ticks: a suspended machine must not drop its sessions when it wakes up.
            await anyio.sleep(tick)
            for entry in self._entries.values():
                away = entry.session.status.state is not State.CONNECTED
                entry.away = entry.away + tick if away else 0.0
                if entry.away >= self._timing.retention:
                    entry.session.finish(
                        LinkClosed(f"The client was away for {self._timing.retention:g} s.")
                    )


@asynccontextmanager
async def serve(
    secret: bytes,
    on_session: Callable[[LinkSession], Awaitable[None]],
    *,
    timing: Timing | None = None,
    features: Iterable[str] = (),
    info: Mapping[str, str] | None = None,
    windows: Mapping[Channel, int] = WINDOWS,
) -> AsyncIterator[LinkServer]:
    """A server of link sessions; all of them are closed when the block ends.

    ``on_session`` runs once for each session, from its first connection on; the session is closed
    when it returns.  It should return when its ``receive`` iterators end.
    """
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        server = LinkServer(
            secret, on_session, timing or Timing(), features, info or {}, windows, tasks
        )
        tasks.start_soon(server.sweep)
        try:
            yield server
        except Exception as error:  # raised below, so that it does not come out in a group
            failure = error
        finally:
            async with anyio.create_task_group() as closing_tasks:
                for session in server.sessions:
                    closing_tasks.start_soon(session.aclose)
            tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _dismiss(wire: Wire, error: LinkError) -> None:
    """Tell the client why, if it still listens."""
    code = next((code for kind, code in _CODES if isinstance(error, kind)), None)
    if code is not None:
        with anyio.move_on_after(1), suppress(LinkError):
            await wire.send([closing(code, str(error))])
