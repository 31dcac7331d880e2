"""The one watcher of a server: while a page listens it looks whether the ledger has changed, which
costs microseconds, keeps the observers of running machines, and tells every page what goes on."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec

from mlinfra_sdk import paths, units
from mlinfra_sdk.cli_cost import BASIS
from mlinfra_sdk.errors import MlinfraError
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines import lifecycle
from mlinfra_sdk.machines.portal import portal

from .messages import Spent, State
from .observers import Observers
from .views import Books, Views, by_id, read

_TICK = 0.5
"""Seconds between two looks at the ledger."""
_REFRESH = 20.0
"""Seconds after which costs are read again although nothing has changed."""
_SETTLE = 30.0
"""When a first page begins to listen, providers are asked what has become of machines, unless that
was so few seconds ago."""
_HEARTBEAT = 15.0
_OF_LEDGER = ("done", "error", "interrupted")


class Watcher:
    """Gives the present :class:`State`, and a stream of them."""

    def __init__(self, root: str, log: logging.Logger) -> None:
        self._log = log
        self._ledger: Ledger | None = None
        self._inode = 0
        self._books: Books | None = None
        self.observers = Observers(self._observed, self._settle, log)
        self.views = Views(root, self.observers)
        self._listeners: set[asyncio.Event] = set()
        self._task: asyncio.Task[None] | None = None
        self._settled = 0.0
        self._dirty = False
        self._revision = 0
        """Counts changes of the ledger, those by this process too, which have no new version."""
        self._settings = 0
        """What pages were told last of the settings file."""
        self.latest = b""
        """The encoded state that pages were told last."""
        self.problem = ""
        self._reading = asyncio.Lock()

    def ledger(self) -> Ledger:
        """This user's ledger; opened again when its file was replaced. Raises
        :class:`LedgerError`."""
        ledger = self._ledger
        if ledger is not None and _inode(ledger) != self._inode:
            ledger.close()
            ledger = None
        if ledger is None:
            ledger = self._ledger = Ledger.open()
            self._inode, self._books = _inode(ledger), None
        return ledger

    async def state(self) -> State:
        """What goes on right now."""
        async with self._reading:
            ledger = self.ledger()
            books = self._books
            changed = books is None or books.version != ledger.version()
            if books is None or changed or time.time() - books.now > _REFRESH:
                self._revision += changed
                books = self._books = await asyncio.to_thread(read, ledger)
        await self._close_ended(books)
        machines = by_id(books.machines)
        shown = [
            self.views.machine(it, books.costs[it.id], books.notebooks.get(it.id, ""))
            for it in books.machines
        ]
        running = [it for it in shown if it.state == "running"]
        return State(
            now=books.now,
            ledger=self._revision,
            settings=_written(paths.config_file()),
            machines=shown,
            runs=self.views.going_on(books, machines),
            spent=Spent(
                usd_per_hour=sum(it.usd_per_hour or 0.0 for it in running),
                unpriced=sum(it.usd_per_hour is None for it in running),
                usd_today=books.today / units.MICRO,
                usd_month=books.month / units.MICRO,
                usd_total=books.total / units.MICRO,
                basis=BASIS,
            ),
        )

    async def _close_ended(self, books: Books) -> None:
        """Whoever sees that a run has ended closes it in the ledger."""
        open_runs = {run.id for run in books.runs if run.seconds is None}
        for machine in books.machines:
            for number, info in self.views.live(machine.id).items():
                if info.ended and number in open_runs:
                    status = info.status if info.status in _OF_LEDGER else "lost"
                    await asyncio.to_thread(
                        self.ledger().close_run,
                        number,
                        status=status,
                        seconds=info.ended - info.started,
                    )
                    self.touched()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The encoded state now and after each change; empty when nothing has happened for some
        seconds. A reader that is slow misses states, never the latest."""
        news = asyncio.Event()
        news.set()
        self._listeners.add(news)
        self._dirty = True
        if self._task is None:
            self._task = asyncio.ensure_future(self._watch())
        try:
            told = b""
            while True:
                try:
                    await asyncio.wait_for(news.wait(), _HEARTBEAT)
                except asyncio.TimeoutError:
                    yield b""
                    continue
                news.clear()
                if self.latest and self.latest != told:
                    told = self.latest
                    yield told
        finally:
            self._listeners.discard(news)
            if not self._listeners:
                self._stop()

    async def _watch(self) -> None:
        if not self._settled or time.monotonic() - self._settled > _SETTLE:
            await self._settle()
        while True:
            try:
                await self._look()
                self.problem = ""
            except MlinfraError as error:
                if str(error) != self.problem:
                    self._log.warning("%s", error)
                self.problem = str(error)
            except Exception:
                self._log.exception("The state of machines and runs cannot be told")
            await asyncio.sleep(_TICK)

    async def _look(self) -> None:
        books = self._books
        if (
            books is not None
            and not self._dirty
            and _written(paths.config_file()) == self._settings
            and all(it.started_at is not None for it in books.machines if it.stopped_at is None)
            and time.time() - books.now < _REFRESH
            and self.ledger().version() == books.version
        ):
            return
        self._dirty = False
        state = await self.state()
        if self._books is not None:
            self.observers.follow(self._books.machines)
        self._settings = state.settings
        self.latest = msgspec.json.encode(state)
        for listener in self._listeners:
            listener.set()

    def _observed(self) -> None:
        self._dirty = True

    def touched(self) -> None:
        """This process has changed the ledger or a machine."""
        self._books, self._dirty = None, True

    async def _settle(self) -> None:
        """Close in the ledger what is gone in fact."""
        self._settled = time.monotonic()
        try:
            await asyncio.wrap_future(portal().submit(lifecycle.settle(self.ledger())))
        except (MlinfraError, OSError) as error:
            self._log.warning("What has become of machines is not known: %s", error)
        self.touched()

    def _stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
        self.observers.close()

    async def close(self) -> None:
        """At the server's end."""
        self._stop()
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            ledger.close()


def _written(path: Path) -> int:
    """When a file was written last, in Unix microseconds; 0 if there is none."""
    try:
        return os.stat(path).st_mtime_ns // 1000  # nanoseconds are too many for JavaScript
    except OSError:
        return 0


def _inode(ledger: Ledger) -> int:
    """Which file it is; 0 when that is gone."""
    try:
        return os.stat(ledger.path).st_ino
    except OSError:
        return 0
