"""The runs of a machine: what was asked for, what came of it, and who follows it.

A run's messages go to its journal first and from there to whoever follows it, so a client that is
slow, away or new gets them all, and the kernel never waits for a client unless the journal is full.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.abc
import msgspec

from mlinfra_sdk.errors import LinkClosed, RequestError
from mlinfra_sdk.link.frames import Channel
from mlinfra_sdk.link.session import LinkSession
from mlinfra_sdk.link.state import State
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.journal import Gap, Journal

_INFO = "run.json"


class Follower:
    """A client that is sent a run's messages. The one that ``owns`` the run will collect it;
    others only watch."""

    def __init__(self, session: LinkSession, owns: bool) -> None:
        self.session = session
        self.owns = owns
        self.active = True
        self.behind = 0

    @property
    def connected(self) -> bool:
        """Whether its client is there right now."""
        return self.active and self.session.status.state is State.CONNECTED


class Run:
    """One run and its journal."""

    def __init__(self, info: m.RunInfo, journal: Journal) -> None:
        self.info = info
        self.journal = journal
        self.collected = False
        self.kept = True
        self._followers: list[Follower] = []
        self._changed = anyio.Event()
        self._caught_up = anyio.Event()

    @property
    def owner(self) -> LinkSession | None:
        """The connected client that is going to collect the run."""
        return next((it.session for it in self._followers if it.owns and it.connected), None)

    async def publish(self, record: m.Record) -> None:
        """Take a message of the kernel."""
        if self.collected:
            for follower in self._followers:
                if follower.connected:
                    with suppress(LinkClosed):
                        await follower.session.send(Channel.JOURNAL, m.encode(record))
            return
        record.number = self.journal.last + 1
        self.journal.append(m.encode(record))
        self._changed.set()
        while self.journal.full and any(it.connected and it.behind for it in self._followers):
            # Its client is only slow: it shall lose nothing.
            self._caught_up = anyio.Event()
            with anyio.move_on_after(1):
                await self._caught_up.wait()

    def admit(self, session: LinkSession, owns: bool) -> Follower:
        """A new follower; one that owns the run takes it over from those before."""
        for follower in self._followers:
            if owns or follower.session is session:
                follower.active = False
        self._followers = [it for it in self._followers if it.active]
        follower = Follower(session, owns)
        self._followers.append(follower)
        self._changed.set()
        return follower

    def leave(self, session: LinkSession) -> None:
        """This client follows the run no longer."""
        for follower in self._followers:
            if follower.session is session:
                follower.active = False
        self._followers = [it for it in self._followers if it.active]
        self._changed.set()

    async def follow(self, follower: Follower, after: int) -> None:
        """Send a follower the messages above ``after``, then what comes, until the run is
        collected or the follower has left."""
        reader = self.journal.reader(after)
        with suppress(LinkClosed):
            while follower.active and not self.collected:
                if self._changed.is_set():
                    self._changed = anyio.Event()
                items = reader.read()
                for item in items:
                    data = self._marker(item) if isinstance(item, Gap) else item
                    await follower.session.send(Channel.JOURNAL, data)
                follower.behind = self.journal.last - reader.number
                if reader.at_end or not items:
                    self._caught_up.set()
                    await self._changed.wait()

    def _marker(self, gap: Gap) -> bytes:
        count = gap.last - gap.first + 1
        text = f"\n[{count} messages of this run were dropped: its journal was full]\n"
        content = json.dumps({"name": "stderr", "text": text}).encode()
        return m.encode(m.Record(self.info.kernel, self.info.run, gap.last, "stream", content))

    def wake(self) -> None:
        """Have followers look again."""
        self._changed.set()

    def save(self) -> None:
        """Leave a trace for an agent that comes after this one."""
        folder = self.journal.folder
        folder.mkdir(mode=0o700, exist_ok=True)
        temporary = folder / f"{_INFO}.new"
        temporary.write_bytes(msgspec.json.encode(self.info))
        temporary.replace(folder / _INFO)


class Runs:
    """All runs of a machine that have not been collected."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder = folder
        self._runs: dict[str, Run] = {}
        self._recover()

    def _recover(self) -> None:
        """Runs of an agent that died: what they published before is not lost."""
        for file in sorted(self._folder.glob(f"*/{_INFO}")):
            info = msgspec.json.decode(file.read_bytes(), type=m.RunInfo)
            journal = Journal.recover(file.parent)
            self._runs[info.run] = Run(info, journal)
            if info.status in ("queued", "running"):
                info.status = "lost"
                info.ended = time.time()

    def add(self, info: m.RunInfo, *, keep: bool) -> Run:
        """A new run; ``keep``: it shall be found even by another agent, after this one."""
        if not info.run.isalnum() or info.run in self._runs:
            raise RequestError(f"{info.run!r} cannot be the name of a run.")
        if info.label and any(run.info.label == info.label for run in self._runs.values()):
            raise RequestError(
                f"There is a run {info.label!r} on this machine already.",
                hint="Collect it by `%remote attach`, cancel it, or choose another name.",
            )
        run = self._runs[info.run] = Run(info, Journal(self._folder / info.run))
        run.kept = keep
        if keep:
            run.save()
        return run

    def get(self, run: str) -> Run | None:
        """The run of this id, if it has not been collected and forgotten."""
        return self._runs.get(run)

    def find(self, name: str) -> Run:
        """The run of this id or label. Raises :class:`RequestError`."""
        for run in self._runs.values():
            if name in (run.info.run, run.info.label) and not run.collected:
                return run
        raise RequestError(
            f"There is no run {name!r} on this machine.",
            hint="It may have been collected already; `%remote runs` lists what is there.",
        )

    def listed(self) -> Iterable[m.RunInfo]:
        """All that is running, waiting, or finished and not collected."""
        for run in self._runs.values():
            if not run.collected:
                run.info.messages = run.journal.last
                run.info.followed = run.owner is not None
                yield run.info

    def ended(self, run: Run, status: str) -> None:
        """The kernel has finished a run."""
        run.info.status = status
        run.info.ended = time.time()
        if run.kept:
            run.save()

    def collect(self, run: Run) -> None:
        """Its client has all of it: the journal goes; late messages still pass through."""
        run.collected = True
        run.wake()
        run.journal.remove()
        for name in [name for name, it in self._runs.items() if it.collected][:-32]:
            del self._runs[name]
