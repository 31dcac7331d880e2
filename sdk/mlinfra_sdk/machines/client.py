"""The client of an agent: requests, records of runs, and chunks, over one link.

Everything public may be called from any thread but the portal's own, except for coroutines, which
belong there.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import anyio
import msgspec

from mlinfra_sdk import errors
from mlinfra_sdk.errors import (
    ChunkMissing,
    LinkClosed,
    MlinfraError,
    StoreError,
    VersionMismatch,
)
from mlinfra_sdk.link.client import connect
from mlinfra_sdk.link.frames import Channel
from mlinfra_sdk.link.session import LinkSession
from mlinfra_sdk.link.state import State, Status, Timing
from mlinfra_sdk.link.wire import Wire
from mlinfra_sdk.machines.moves import Move, Progress, unseen
from mlinfra_sdk.machines.portal import Portal
from mlinfra_sdk.objects.bulk import Bulk, Source
from mlinfra_sdk.objects.compression import FEATURE
from mlinfra_sdk.objects.store import CHUNK_SIZE, ChunkStore
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.records import ENDS, Record, decode_record

T = TypeVar("T")

_CHECK_EVERY = 5.0
"""Seconds between questions to the provider whether the machine lives."""
_LATE_SINKS = 64
_NO_SIZES: Mapping[bytes, int] = MappingProxyType({})

Sink = Callable[[Record], Awaitable[None]]


class AgentClient:
    """A connection to one machine's agent. Make one with :meth:`open`."""

    def __init__(
        self,
        portal: Portal,
        store: ChunkStore,
        give_up: float,
    ) -> None:
        self._portal = portal
        self._store = store
        self._timing = Timing(give_up=give_up)
        self._tries = 0
        """Wires that were opened since the link was last connected."""
        self.status: Status | None = None
        """The state of the link."""
        self._link: LinkSession | None = None
        self._ids = itertools.count(1)
        self._waiting: dict[int, concurrent.futures.Future[bytes]] = {}
        self._sinks: dict[str, Sink] = {}
        self._late_sinks: OrderedDict[str, Sink] = OrderedDict()
        """Of runs that have ended; their threads may still publish."""
        self._other: Sink | None = None
        self._on_close: list[Callable[[LinkClosed], None]] = []
        self._close_requested: anyio.Event | None = None
        self.closed: LinkClosed | None = None
        """Why the link is closed, once it is."""
        self._requested = 0
        self._bulk: Bulk

    @property
    def bytes_sent(self) -> int:
        """Bytes of requests and chunks, as they were given to the link."""
        return self._requested + self._bulk.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Bytes of chunks, as they came over the link."""
        return self._bulk.bytes_received

    @classmethod
    def open(
        cls,
        portal: Portal,
        factory: Callable[[], Awaitable[Wire]],
        secret: bytes,
        store: ChunkStore,
        give_up: float = 600.0,
        check: Callable[[], Awaitable[None]] | None = None,
    ) -> AgentClient:
        """Connect; a link that is cut is mended until ``give_up`` seconds have passed.

        ``check`` is called now and then while that fails, to raise :class:`LinkClosed` if the
        machine has ended. Raises :class:`mlinfra_sdk.errors.LinkError`.
        """
        client = cls(portal, store, give_up)
        if check is not None:
            factory = client._checked(factory, check)
        opened: concurrent.futures.Future[None] = concurrent.futures.Future()
        portal.start(client._serve(factory, secret, opened))
        try:
            opened.result()
        except BaseException:
            client.close()
            raise
        return client

    async def _serve(
        self,
        factory: Callable[[], Awaitable[Wire]],
        secret: bytes,
        opened: concurrent.futures.Future[None],
    ) -> None:
        self._close_requested = anyio.Event()
        try:
            async with connect(
                factory,
                secret,
                timing=self._timing,
                features=[FEATURE],
                on_status=self._take_status,
            ) as link:
                self._link = link
                self._bulk = Bulk(link, self._store)
                opened.set_result(None)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._bulk.receive)
                    for pump in (self._replies, self._records, self._news, self._until_closed):
                        tasks.start_soon(pump, link)
                    await self._close_requested.wait()
                    tasks.cancel_scope.cancel()
            reason = link.status.error
        except BaseException as error:
            reason = error if isinstance(error, errors.LinkError) else LinkClosed(repr(error))
            if not opened.done():
                opened.set_exception(error)
        finally:
            self._end(reason)

    def _checked(
        self, factory: Callable[[], Awaitable[Wire]], check: Callable[[], Awaitable[None]]
    ) -> Callable[[], Awaitable[Wire]]:
        next_check = 0.0

        async def connect() -> Wire:
            nonlocal next_check
            # A wire may well be opened to a machine on which no agent runs any more.
            if self._tries and anyio.current_time() >= next_check:
                next_check = anyio.current_time() + _CHECK_EVERY
                await check()
            self._tries += 1
            return await factory()

        return connect

    def _take_status(self, status: Status) -> None:
        self.status = status
        if status.state is State.CONNECTED:
            self._tries = 0

    @property
    def cut_off(self) -> bool:
        """Whether the machine cannot be reached right now."""
        return self.status is not None and self.status.state is State.RECONNECTING

    def _end(self, reason: errors.LinkError | None) -> None:
        self.closed = LinkClosed(
            reason.message if reason else "The connection to the machine is closed."
        )
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(self.closed)
        self._waiting.clear()
        for act in self._on_close:
            act(self.closed)

    async def _until_closed(self, link: LinkSession) -> None:
        await link.wait_closed()
        assert self._close_requested is not None
        self._close_requested.set()

    async def _replies(self, link: LinkSession) -> None:
        with contextlib.suppress(LinkClosed):
            async for message in link.receive(Channel.CONTROL):
                reply = m.decode_reply(message.data)
                future = self._waiting.pop(reply.id, None)
                if future is None or future.done():
                    continue
                if reply.error:
                    kind = getattr(errors, reply.kind, MlinfraError)
                    future.set_exception(_rebuilt(kind, reply))
                else:
                    future.set_result(reply.result)

    async def _records(self, link: LinkSession) -> None:
        await self._pass_on(link, Channel.JOURNAL)

    async def _news(self, link: LinkSession) -> None:
        await self._pass_on(link, Channel.METRICS)

    async def _pass_on(self, link: LinkSession, channel: Channel) -> None:
        with contextlib.suppress(LinkClosed):
            async for message in link.receive(channel):
                record = decode_record(message.data)
                sink = self._sinks.get(record.parent) or self._late_sinks.get(record.parent)
                if sink is not None and record.msg_type in ENDS:
                    self._remember(record.parent, sink)
                sink = sink or self._other
                if sink is not None:
                    await sink(record)

    def _remember(self, parent: str, sink: Sink) -> None:
        """What has this parent has ended: the oldest of those are forgotten."""
        self._sinks.pop(parent, None)
        self._late_sinks[parent] = sink
        while len(self._late_sinks) > _LATE_SINKS:
            self._late_sinks.popitem(last=False)

    def when_closed(self, act: Callable[[LinkClosed], None]) -> None:
        """Call ``act`` in the portal's thread when the link is closed for good."""
        self._on_close.append(act)

    # -- requests ----------------------------------------------------------------------------

    def next_id(self) -> int:
        """An id for a request."""
        return next(self._ids)

    def send(self, request: m.AnyRequest) -> concurrent.futures.Future[bytes]:
        """Send a request; the future gives its encoded result or raises its error."""
        future: concurrent.futures.Future[bytes] = concurrent.futures.Future()
        data = m.encode(request)
        self._requested += len(data)
        self._portal.soon(self._send, request.id, data, future)
        return future

    def _send(self, number: int, data: bytes, future: concurrent.futures.Future[bytes]) -> None:
        if self._link is None or self.closed is not None:
            future.set_exception(self.closed or LinkClosed("There is no connection."))
            return
        self._waiting[number] = future
        try:
            if not self._link.send_nowait(Channel.CONTROL, data):
                self._portal.start(self._link.send(Channel.CONTROL, data))
        except LinkClosed as error:
            self._waiting.pop(number, None)
            future.set_exception(error)

    def ask(self, request: m.AnyRequest, kind: type[T]) -> T:
        """Send a request and wait for its result."""
        data = self.send(request).result()
        try:
            return m.decode_as(kind, data)
        except msgspec.ValidationError as error:
            raise VersionMismatch(
                f"The machine's agent gives answers of another version ({error}).",
                hint="Stop that machine; a new one gets the version of this process.",
            ) from None

    # -- records -----------------------------------------------------------------------------

    def listen(self, parent: str, sink: Sink) -> None:
        """Give ``sink`` what has this parent; it is awaited in the portal's thread, and while it
        waits the machine is held back. Of those whose run has ended the oldest are forgotten."""
        self._sinks[parent] = sink

    def ignore(self, parent: str) -> None:
        """What has this parent belongs to the rest from now on."""
        self._sinks.pop(parent, None)
        self._late_sinks.pop(parent, None)

    def listen_to_rest(self, sink: Sink) -> None:
        """Give ``sink`` what no other one takes."""
        self._other = sink

    # -- chunks ------------------------------------------------------------------------------

    def upload(
        self, digests: list[bytes], progress: Progress = unseen, source: Source | None = None
    ) -> int:
        """Send the chunks that the machine lacks, from the store or another ``source``, and wait
        until it has them; gives the bytes.

        ``progress`` is called in this thread now and then with the bytes done and in all. What was
        sent before an interrupt or a cut is not sent again. Raises :class:`ChunkCorrupt` or
        :class:`ChunkMissing` for a chunk that this side has lost.
        """
        if not digests:
            return 0
        return self.begin_upload(m.Missing(self.next_id(), digests), source).wait(progress)

    def begin_upload(self, question: m.AnyRequest, source: Source | None = None) -> Move:
        """As :meth:`upload`, while the caller goes on; the machine's answer to ``question`` is
        which chunks it lacks."""
        move = Move()

        async def transfer() -> int:
            missing = m.decode_as(list[bytes], await self._ask_in_loop(question))
            if not missing:
                return 0
            sizes = (source or self._store).size
            move.total = await anyio.to_thread.run_sync(lambda: sum(map(sizes, missing)))
            return await self._upload(missing, move, source or self._store)

        return move.begin(self._portal, transfer())

    async def _upload(self, digests: list[bytes], move: Move, source: Source) -> int:
        bulk = self._bulk
        before = bulk.bytes_sent
        for verify in (False, True, True):
            mark, lost = await bulk.send(digests, source=source, verify=verify, moved=move.add)
            if verify and lost:
                source.read_chunk(lost[0])
                raise _unsteady(digests)
            request = m.Await(self.next_id(), digests, mark)
            digests = m.decode_as(list[bytes], await self._ask_in_loop(request))
            if not digests:
                return bulk.bytes_sent - before
        raise _unsteady(digests)

    def download(
        self,
        digests: Iterable[bytes],
        progress: Progress = unseen,
        sizes: Mapping[bytes, int] = _NO_SIZES,
    ) -> int:
        """Get the chunks that the store lacks from the machine; gives their number of bytes.

        As :meth:`upload`; chunks that are not in ``sizes`` count as full ones.
        """
        missing = self._store.missing(digests)
        if not missing:
            return 0
        move = Move(sum(sizes.get(digest, CHUNK_SIZE) for digest in missing))
        return move.begin(self._portal, self._download(missing, move)).wait(progress)

    async def _download(self, digests: list[bytes], move: Move) -> int:
        bulk = self._bulk
        before, stored = bulk.bytes_received, bulk.stored
        move.watch(lambda: bulk.stored - stored)
        for verify in (False, True, True):
            request = m.Fetch(self.next_id(), digests, verify)
            try:
                reply = await self._ask_in_loop(request)
            except BaseException:  # interrupted: the machine need not send the rest
                if self.closed is None:
                    self.send(m.Halt(self.next_id(), request.id))
                raise
            fetched = m.decode_as(m.Fetched, reply)
            await bulk.passed(fetched.mark)
            digests = await anyio.to_thread.run_sync(self._store.missing, digests)
            if not digests:
                return bulk.bytes_received - before
            if verify and fetched.unreadable:
                break
        raise ChunkMissing(
            f"The machine has lost {len(digests)} chunks of what is to be brought here.",
            hint="Its store was damaged or cleared; compute the values again.",
        )

    async def bring(self, digests: list[bytes]) -> None:
        """As :meth:`download`, in the portal's own loop."""
        missing = await anyio.to_thread.run_sync(self._store.missing, digests)
        if missing:
            await self._download(missing, Move())

    async def give(self, digests: list[bytes]) -> None:
        """As :meth:`upload`, in the portal's own loop."""
        request = m.Missing(self.next_id(), digests)
        missing = m.decode_as(list[bytes], await self._ask_in_loop(request))
        if missing:
            await self._upload(missing, Move(), self._store)

    async def _ask_in_loop(self, request: m.AnyRequest) -> bytes:
        future: concurrent.futures.Future[bytes] = concurrent.futures.Future()
        self._send(request.id, m.encode(request), future)
        return await asyncio.wrap_future(future)

    def wait_gone(self, limit: float) -> None:
        """Wait for so many seconds at most until the agent, which is ending, has gone."""
        deadline = time.monotonic() + limit
        while self.closed is None and not self.cut_off and time.monotonic() < deadline:
            time.sleep(0.02)

    def close(self) -> None:
        """Close the link in good order."""

        async def request() -> None:
            if self._close_requested is not None:
                self._close_requested.set()

        self._portal.start(request())


def _unsteady(digests: list[bytes]) -> StoreError:
    return StoreError(
        f"{len(digests)} chunks did not arrive on the machine as they were sent.",
        hint="Its disk or the connection damages data; try another machine.",
    )


def _rebuilt(kind: Any, reply: m.Reply) -> Exception:
    """The agent's error as the class that it has here."""
    if isinstance(kind, type) and issubclass(kind, MlinfraError):
        with contextlib.suppress(TypeError):
            return kind(reply.error, hint=reply.hint)
    return MlinfraError(reply.error, hint=reply.hint)
