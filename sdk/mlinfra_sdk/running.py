"""One run as its client sees it: its messages, in order, until its end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import queue
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import anyio
import msgspec

from mlinfra_sdk.errors import NotTransferable, RemoteError
from mlinfra_sdk.frontend import Frontend
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.machines.ends import notice
from mlinfra_sdk.machines.portal import Portal
from mlinfra_sdk.namespace.sync import Report
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.records import ENDING, ENDS, INPUT, RESULT, USAGE, Record
from mlinfra_sdk.worker.run_usage import RunUsage
from mlinfra_sdk.worker.watchdog import End

_PATIENCE = 3.0
"""Seconds after an interrupt before the user is told that the cell goes on."""
_COLOR = re.compile("\x1b\\[[0-9;]*m")
_HELD = 8 << 20
"""Bytes of messages that may wait for the front end before the machine is held back."""


class Outcome(msgspec.Struct):
    """How a run ended: the execute reply, the encoded Outputs, and what it has used if it was
    looked at."""

    reply: dict[str, Any]
    outputs: bytes
    usage: RunUsage | None = None


class Result(msgspec.Struct):
    """What a run left behind. ``error`` is the exception that it raised, of its own type where
    that can be rebuilt here; ``traceback`` its rendered lines."""

    value: Any = None
    error: BaseException | None = None
    traceback: list[str] = []
    payload: list[dict[str, Any]] = []
    report: Report = msgspec.field(default_factory=Report)
    usage: RunUsage | None = None

    def get(self) -> Any:
        """The value, or its error raised; warnings become Python's."""
        for warning in self.report.warnings:
            warnings.warn(warning, RuntimeWarning, stacklevel=3)
        if self.error is not None:
            raise self.error
        return self.value


class Running:
    """A run under way. ``sink`` takes its records in the portal's thread; :meth:`wait` gives them
    to the front end in the caller's."""

    def __init__(self, name: str, portal: Portal, publish: Callable[[Record], None]) -> None:
        self.name = name
        self._portal = portal
        self._publish = publish
        self._queue: queue.SimpleQueue[Record | BaseException | None] = queue.SimpleQueue()
        self._interrupted = False
        self._put = self._taken = 0
        self._blocked = False
        self._room = anyio.Event()
        self._over = False
        self.stopped = ""
        """Why the machine has stopped it, once it has."""
        self._usage: RunUsage | None = None

    async def sink(self, record: Record) -> None:
        """Take a record. What comes after the end (threads of the cell) is shown at once."""
        if self._over:
            self._show(record)
            return
        if record.msg_type in ENDS:
            self._over = True
        elif record.msg_type == ENDING:
            end = msgspec.json.decode(record.content, type=End)
            self.stopped = notice(end) if end.cause == "run" and end.seconds <= 0 else ""
        self._put += _size(record)
        self._queue.put(record)
        while self._put - self._taken > _HELD and not self._over:
            self._room = anyio.Event()
            self._blocked = True
            if self._put - self._taken > _HELD:  # it may have been taken just before that
                await self._room.wait()
            self._blocked = False

    def fail(self, error: BaseException) -> None:
        """The run cannot go on: :meth:`wait` raises ``error``."""
        self._over = True
        self._queue.put(error)

    def leave(self) -> None:
        """Nobody waits any longer; what the run still publishes is shown as it comes."""
        self._portal.soon(self._let_go)

    def _let_go(self) -> None:
        self._over = True
        while not self._queue.empty():
            item = self._queue.get()
            if isinstance(item, Record):
                self._show(item)
        self._room.set()

    def _show(self, record: Record) -> None:
        if record.msg_type not in ENDS and record.msg_type != INPUT:
            self._publish(record)

    def submitted(self, request: concurrent.futures.Future[bytes]) -> None:
        """The request that begins it; if that is refused, the run has failed."""

        def refused(done: concurrent.futures.Future[bytes]) -> None:
            error = done.exception()
            if error is not None:
                self.fail(error)

        request.add_done_callback(refused)

    def interrupt(self) -> None:
        """Have :meth:`wait` raise KeyboardInterrupt, before it takes the next record."""
        self._interrupted = True
        self._queue.put(None)

    def _take(self, record: Record) -> None:
        """The front end has a record now. Waking the portal's thread costs more than most cells'
        other work, so it is done only when that waits for room."""
        self._taken += _size(record)
        if self._blocked:
            self._portal.soon(self._have_room)

    def _have_room(self) -> None:
        self._room.set()

    def wait(
        self,
        ask: Callable[[dict[str, Any]], None],
        tick: Callable[[], None],
        every: float = 1.0,
        last: int | None = None,
    ) -> Outcome | Record:
        """Until the run's end: its outcome, or the record of another end: of its kernel's death,
        of its following, of the handling of a comm message.

        May be called again after an interrupt. ``ask`` handles an input request, ``tick`` is
        called every so many seconds. With ``last`` only up to the message of this number.
        """
        due = time.monotonic() + every
        while True:
            if self._interrupted:
                self._interrupted = False
                raise KeyboardInterrupt
            wait = due - time.monotonic()
            if wait <= 0:
                tick()
                due = time.monotonic() + every
                continue
            try:
                item = self._queue.get(timeout=wait)
            except queue.Empty:
                continue
            if item is None:
                continue
            if isinstance(item, BaseException):
                raise item
            self._take(item)
            if item.msg_type == RESULT:
                return Outcome(json.loads(item.content), item.buffers[0], self._usage)
            if item.msg_type in ENDS:
                return item
            if item.msg_type == INPUT:
                ask(json.loads(item.content))
            else:
                if item.msg_type == USAGE:
                    self._usage = msgspec.json.decode(item.content, type=RunUsage)
                self._publish(item)
            if last is not None and item.number >= last:
                return item


def follow(
    client: AgentClient,
    kernel: str,
    run: Running,
    frontend: Frontend,
    look: Callable[[Frontend], None] = lambda frontend: None,
) -> Outcome | Record:
    """Until the run's end, as :meth:`Running.wait`. The first interrupt goes to the machine, a
    second one leaves the run. ``look`` is called about once a second."""

    def ask(content: dict[str, Any]) -> None:
        with interrupts_raised():
            text = frontend.ask(content["prompt"], bool(content["password"]))
        client.send(m.Answer(client.next_id(), kernel, text))

    interrupted = 0.0
    cut_off = False

    def tick() -> None:
        nonlocal interrupted, cut_off
        if client.closed is not None:
            run.fail(client.closed)
        if client.cut_off != cut_off:
            cut_off = client.cut_off
            frontend.phase("reconnecting" if cut_off else "running")
        if interrupted and time.monotonic() - interrupted > _PATIENCE:
            interrupted = float("inf")
            frontend.note(
                "The interrupt was sent, but the cell goes on. Interrupt again to leave it; "
                "`%remote restart` then ends it for good."
            )
        look(frontend)
        frontend.tick()

    # Raised in the midst of publishing, an interrupt would lose a message.
    with interrupts_held(run):
        while True:
            try:
                end = run.wait(ask, tick)
            except KeyboardInterrupt:
                if interrupted:
                    run.leave()
                    raise
                interrupted = time.monotonic()
                client.send(m.Interrupt(client.next_id(), kernel))
                continue
            if cut_off:
                frontend.phase("running")
            return end


def interrupts_held(run: Running) -> contextlib.AbstractContextManager[None]:
    """Ctrl-C is noted for the next :meth:`Running.wait` in here, and raises nowhere else."""
    return _handler(lambda number, frame: run.interrupt())


def interrupts_raised() -> contextlib.AbstractContextManager[None]:
    """Ctrl-C raises KeyboardInterrupt at once in here."""
    return _handler(signal.default_int_handler)


@contextlib.contextmanager
def _handler(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """What Ctrl-C does for a while, unless something else than Python decides that."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _size(record: Record) -> int:
    return 256 + len(record.content) + sum(map(len, record.buffers))


def exception_of(reply: Mapping[str, Any], error: BaseException | None) -> BaseException:
    """The exception that the run raised, or one that stands for it."""
    if error is not None:
        return error
    name, text = reply["ename"], reply["evalue"]
    if name == "KeyboardInterrupt":
        return KeyboardInterrupt(*filter(None, [text]))
    if name == "NotTransferable":
        return NotTransferable(text)
    kind = type(name, (RemoteError,), {"__module__": RemoteError.__module__})
    lines = reply.get("traceback", [])
    stand_in: BaseException = kind(name, text, lines)
    # Python (since 3.11) prints notes below an error that nobody caught.
    vars(stand_in)["__notes__"] = [_COLOR.sub("", line) for line in lines]
    return stand_in
