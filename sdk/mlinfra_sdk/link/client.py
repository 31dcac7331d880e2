"""The client's end of a link: connects, and connects again after every cut."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import NamedTuple

import anyio
from anyio.abc import TaskGroup

from mlinfra_sdk.errors import (
    AuthenticationError,
    LinkClosed,
    LinkError,
    MlinfraError,
    ProtocolError,
    VersionMismatch,
)
from mlinfra_sdk.link.flow import WINDOWS
from mlinfra_sdk.link.frames import Channel, Decoder
from mlinfra_sdk.link.handshake import SESSION_ID_BYTES, Peer, Resume, approach
from mlinfra_sdk.link.session import LinkSession
from mlinfra_sdk.link.state import State, Status, Timing
from mlinfra_sdk.link.wire import Wire

_MALFORMED_LIMIT = 10
"""Wires in a row that bring nothing but a malformed frame before the session is given up."""


class _Opened(NamedTuple):
    wire: Wire
    decoder: Decoder
    peer: Peer
    point: Resume


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
    windows: Mapping[Channel, int] = WINDOWS,
) -> AsyncIterator[LinkSession]:
    """A session with the agent that ``factory``'s wires lead to; closed when the block ends.

    ``factory`` opens a new wire each time it is called (`connect_unix`, `open_relay`).  When it
    fails with :class:`LinkError` or ``OSError`` it is called again after a pause; with any other
    error of ours (:class:`LinkClosed`: there is no agent any more) the session ends.

    The first connection must succeed within ``connect_within`` seconds; a wrong secret or version
    fails at once.  Later cuts are mended in the background until ``timing.give_up``; ``on_status``
    hears of every change of state, in the event loop, and must return quickly.
    """
    client = _Client(factory, secret, timing or Timing(), features, info or {}, windows, on_status)
    session = client.session
    opened = await client.open_first(connect_within)
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.keep, opened, tasks)
        await session.wait_connected()
        try:
            yield session
        except Exception as error:  # raised below, so that it does not come out in a group
            failure = error
        finally:
            await session.aclose()
            tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


class _Client:
    def __init__(
        self,
        factory: Callable[[], Awaitable[Wire]],
        secret: bytes,
        timing: Timing,
        features: Iterable[str],
        info: Mapping[str, str],
        windows: Mapping[Channel, int],
        on_status: Callable[[Status], None] | None,
    ) -> None:
        self._factory = factory
        self._secret = secret
        self._features = frozenset(features)
        self._info = info
        self._attempt = 0
        self.timing = timing
        self.session = LinkSession(
            os.urandom(SESSION_ID_BYTES), timing=timing, windows=windows, on_status=on_status
        )

    async def open_first(self, within: float) -> _Opened:
        return await self._open_until(anyio.current_time() + within, self.timing.retry_min)

    async def keep(self, opened: _Opened, tasks: TaskGroup) -> None:
        """Drive one wire after another until the session is closed."""
        session, timing = self.session, self.timing
        pause = timing.retry_min
        malformed = 0
        while True:
            progress = session.progress
            try:
                fault = await session.drive(*opened)
            except LinkClosed as error:
                session.finish(error)
                return
            finally:
                # In the background: ending a process of a dead connection may take a second.
                tasks.start_soon(_close, opened.wire)
            if session.status.state is State.CLOSED:
                return
            # A wire that brought nothing before it broke is no reason to hurry.
            fruitful = session.progress != progress
            pause = timing.retry_min if fruitful else min(pause * 2, timing.retry_max)
            malformed = malformed + 1 if isinstance(fault, ProtocolError) and not fruitful else 0
            if malformed >= _MALFORMED_LIMIT:
                session.finish(fault)
                return
            await anyio.sleep(pause * random.uniform(0.5, 1))
            try:
                opened = await self._open_until(anyio.current_time() + timing.give_up, pause)
            except MlinfraError as error:
                session.finish(LinkClosed(error.message, hint=error.hint))
                return

    async def _open_until(self, deadline: float, pause: float) -> _Opened:
        """Try to connect until it succeeds or can no longer."""
        while True:
            try:
                return await self._open()
            except (AuthenticationError, VersionMismatch, LinkClosed):
                raise
            except LinkError as error:
                if anyio.current_time() >= deadline:
                    raise LinkClosed(
                        f"The agent cannot be reached: {error.message}", hint=error.hint
                    ) from None
            await anyio.sleep(pause * random.uniform(0.5, 1))
            pause = min(pause * 2, self.timing.retry_max)

    async def _open(self) -> _Opened:
        """One attempt: a new wire and its handshake."""
        session = self.session
        self._attempt += 1
        wire: Wire | None = None
        try:
            with anyio.fail_after(self.timing.handshake):
                wire = await self._factory()
                decoder, peer, point = await approach(
                    wire,
                    self._secret,
                    session=session.id,
                    attempt=self._attempt,
                    resume=session.resume_point(),
                    resuming=session.peer is not None,
                    windows=session.windows,
                    features=self._features,
                    info=self._info,
                )
            return _Opened(wire, decoder, peer, point)
        except BaseException as error:
            if wire is not None:
                await _close(wire)
            if isinstance(error, TimeoutError):
                raise LinkError(f"No answer within {self.timing.handshake:g} s.") from None
            if isinstance(error, OSError) and not isinstance(error, LinkError):
                raise LinkError(f"The connection failed: {error}.") from error
            raise


async def _close(wire: Wire) -> None:
    with anyio.CancelScope(shield=True):
        await wire.aclose()
