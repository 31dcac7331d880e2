"""Chunks from store to store over the BULK channel of a link; each end has a :class:`Bulk`.

Several threads read (and compress), several hash and store; chunks come in any order. The receiver
names each by its own digest, so one that was damaged on its way, or in the sender's store, is just
not there in the end. A *mark* sent after chunks tells that all of them have been dealt with.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from typing import Protocol

import anyio
import anyio.to_thread

from mlinfra_sdk.errors import LinkClosed, StoreError
from mlinfra_sdk.link.flow import Message
from mlinfra_sdk.link.frames import Buffer, Channel
from mlinfra_sdk.link.session import LinkSession
from mlinfra_sdk.objects.compression import FEATURE, Compressor, decompress
from mlinfra_sdk.objects.store import ChunkStore

RAW, COMPRESSED, MARK = 0, 1, 2
"""What a message on BULK is, by its stream number."""

_READERS = 3
_WRITERS = 3


class Source(Protocol):
    """Where chunks can be read: a store, or files of known content."""

    def read_chunk(self, digest: bytes, *, verify: bool = True) -> bytes:
        """Raises :class:`StoreError`."""
        ...

    def size(self, digest: bytes) -> int:
        """Bytes of a chunk."""
        ...


class Bulk:
    """One end of the chunks' way between two stores. Use it in the session's event loop."""

    def __init__(self, session: LinkSession, store: ChunkStore) -> None:
        self.bytes_sent = 0
        """Bytes of chunks as they were given to the link."""
        self.bytes_received = 0
        self.stored = 0
        """Bytes of chunks that have come, at their full size."""
        self._session = session
        self._store = store
        self._compressor = Compressor()
        self._sending = 0
        self._marks = itertools.count(1)
        self._passed = 0
        self._closed = False
        self._changed = anyio.Event()
        self._writers = anyio.Semaphore(_WRITERS)
        self._failure: StoreError | None = None
        self._failures: dict[int, StoreError] = {}
        """What could not be stored before each mark."""

    # Sending

    async def send(
        self,
        digests: Iterable[bytes],
        *,
        source: Source | None = None,
        verify: bool = False,
        moved: Callable[[int], None] = lambda size: None,
    ) -> tuple[int, list[bytes]]:
        """Send chunks of the store, or of another ``source``, and a mark behind them: gives its
        number, and what could not be read.

        With ``verify`` a chunk that is damaged here is found here (and removed); without it the
        other side finds out. ``moved`` is told the size of each chunk. Raises
        :class:`LinkClosed`.
        """
        todo = iter(digests)
        unreadable: list[bytes] = []
        closed: list[LinkClosed] = []

        async def reader() -> None:
            for digest in todo:
                try:
                    size, data, kind = await anyio.to_thread.run_sync(
                        self._load, source or self._store, digest, verify
                    )
                    await self._session.send(Channel.BULK, data, kind)
                except StoreError:
                    unreadable.append(digest)
                except LinkClosed as error:
                    closed.append(error)
                    return
                else:
                    self.bytes_sent += len(data)
                    moved(size)
                    self._compressor.observe(*self._session.flow(Channel.BULK), time.monotonic())

        self._sending += 1
        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(_READERS):
                    tasks.start_soon(reader)
        finally:
            self._sending -= 1
            if not self._sending:
                self._compressor.rest()
        if closed:
            raise closed[0]
        mark = next(self._marks)
        await self._session.send(Channel.BULK, mark.to_bytes(8, "big"), MARK)
        return mark, unreadable

    def _load(self, source: Source, digest: bytes, verify: bool) -> tuple[int, bytes, int]:
        chunk = source.read_chunk(digest, verify=verify)
        peer = self._session.peer
        if peer is not None and FEATURE in peer.features:
            packed = self._compressor.compress(chunk)
            if packed is not None:
                return len(chunk), packed, COMPRESSED
        return len(chunk), chunk, RAW

    # Receiving

    async def receive(self) -> None:
        """Store what comes until the session is closed."""
        try:
            async with anyio.create_task_group() as tasks:
                try:
                    async for message in self._session.receive(Channel.BULK):
                        if message.stream == MARK:
                            await self._pass(int.from_bytes(message.data, "big"))
                        else:
                            await self._writers.acquire()
                            tasks.start_soon(self._take, message)
                except LinkClosed:  # whoever waits for a mark is told
                    pass
        finally:
            self._closed = True
            self._notify()

    async def _take(self, message: Message) -> None:
        try:
            self.bytes_received += len(message.data)
            size = await anyio.to_thread.run_sync(self._put, message.data, message.stream)
            self.stored += size
        except StoreError as error:
            self._failure = error
        finally:
            self._writers.release()

    def _put(self, data: Buffer, kind: int) -> int:
        if kind == COMPRESSED:
            try:
                data = decompress(data)
            except ValueError:  # damaged on its way: it will be missed
                return 0
        self._store.put_chunk(data)
        return len(data)

    async def _pass(self, mark: int) -> None:
        for _ in range(_WRITERS):
            await self._writers.acquire()
        for _ in range(_WRITERS):
            self._writers.release()
        self._passed = mark
        if self._failure is not None:
            self._failures = {mark: self._failure}
            self._failure = None
        self._notify()

    async def passed(self, mark: int) -> None:
        """Until all that the other side sent before this mark has been dealt with. Raises
        :class:`LinkClosed`, or :class:`StoreError` if something of it could not be stored."""
        while self._passed < mark:
            if self._closed:
                raise LinkClosed("The connection to the machine is closed.")
            await self._changed.wait()
        failure = self._failures.pop(mark, None)
        if failure is not None:
            raise failure

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
