"""One run as its client sees it: its messages, in order, until its end."""

from __future__ import annotations

import json
import queue
from collections.abc import Callable
from typing import Any

import anyio
import msgspec

from mlinfra_sdk.machines.portal import Portal
from mlinfra_sdk.worker.messages import DIED, INPUT, RESULT, Record

_HELD = 8 << 20
"""Bytes of messages that may wait for the front end before the machine is held back."""


class Outcome(msgspec.Struct):
    """How a run ended: the execute reply, and the encoded Outputs."""

    reply: dict[str, Any]
    outputs: bytes


class Running:
    """A run under way. ``sink`` takes its records in the portal's thread; :meth:`wait` gives them
    to the front end in the caller's."""

    def __init__(self, name: str, portal: Portal, publish: Callable[[Record], None]) -> None:
        self.name = name
        self._portal = portal
        self._publish = publish
        self._queue: queue.SimpleQueue[Record | BaseException] = queue.SimpleQueue()
        self._held = 0
        self._room = anyio.Event()
        self._over = False

    async def sink(self, record: Record) -> None:
        """Take a record. What comes after the end (threads of the cell) is shown at once."""
        if self._over:
            self._publish(record)
            return
        if record.msg_type in (RESULT, DIED):
            self._over = True
        size = _size(record)
        self._held += size
        self._queue.put(record)
        while self._held > _HELD and not self._over:
            self._room = anyio.Event()
            await self._room.wait()

    def fail(self, error: BaseException) -> None:
        """The run cannot go on: :meth:`wait` raises ``error``."""
        self._over = True
        self._queue.put(error)

    def _taken(self, size: int) -> None:
        self._held -= size
        self._room.set()

    def wait(
        self, ask: Callable[[dict[str, Any]], None], tick: Callable[[], None], every: float = 1.0
    ) -> Outcome | Record:
        """Until the run's end: its outcome, or the record of its kernel's death.

        May be called again after an interrupt. ``ask`` handles an input request, ``tick`` is
        called every so many seconds.
        """
        while True:
            try:
                item = self._queue.get(timeout=every)
            except queue.Empty:
                tick()
                continue
            if isinstance(item, BaseException):
                raise item
            self._portal.soon(self._taken, _size(item))
            if item.msg_type == RESULT:
                return Outcome(json.loads(item.content), item.buffers[0])
            if item.msg_type == DIED:
                return item
            if item.msg_type == INPUT:
                ask(json.loads(item.content))
            else:
                self._publish(item)


def _size(record: Record) -> int:
    return 256 + len(record.content) + sum(map(len, record.buffers))
