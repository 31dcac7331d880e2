"""The runs of a machine: what was asked for, what came of it, and who follows it.

A run's messages go to its journal first and from there to whoever follows it, so a client that is
slow, away or new gets them all, and the kernel never waits for a client unless the journal is full.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import anyio
import msgspec

from mlinfra_sdk.errors import LinkClosed, RequestError
from mlinfra_sdk.link.frames import MAX_MESSAGE, Channel
from mlinfra_sdk.link.session import LinkSession
from mlinfra_sdk.link.state import State
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.journal import LIMIT, Gap, Journal
from mlinfra_sdk.worker.records import DIED, LEFT, RESULT, Record, decode_record

logger = logging.getLogger(__name__)

_INFO = "run.json"


class Follower:
    """A client that is sent a run's messages above the number ``after``. The one that ``owns``
    the run will collect it; others only watch. One that ``keeps`` takes its checkpoints, and gives
    those of before."""

    def __init__(
        self, session: LinkSession, journal: Journal, after: int, owns: bool, keeps: bool
    ) -> None:
        self.session = session
        self.reader = journal.reader(after)
        self.owns = owns
        self.keeps = keeps
        self.active = True
        self.reading = True
        self.farewell = ""
        """What its client is told in the end, if it is sent away."""

    @property
    def connected(self) -> bool:
        """Whether its client is there right now."""
        return self.active and self.session.status.state is State.CONNECTED

    def dismiss(self, farewell: str = "") -> None:
        """Send it nothing more but this."""
        self.active = False
        self.farewell = farewell


class Run:
    """One run and its journal."""

    def __init__(self, info: m.RunInfo, journal: Journal) -> None:
        self.info = info
        self.journal = journal
        self.collected = False
        self._followers: list[Follower] = []
        self._changed = anyio.Event()
        self._caught_up = anyio.Event()

    @property
    def owner(self) -> LinkSession | None:
        """The connected client that is going to collect the run."""
        return next((it.session for it in self._followers if it.owns and it.connected), None)

    @property
    def kept(self) -> bool:
        """Whether there is a client for the run's checkpoints, connected or not right now."""
        return any(
            it.keeps and it.active and it.session.status.state is not State.CLOSED
            for it in self._followers
        )

    @property
    def keeper(self) -> LinkSession | None:
        """The connected client that takes the run's checkpoints."""
        return next((it.session for it in self._followers if it.keeps and it.connected), None)

    async def publish(self, record: Record) -> None:
        """Take a message of the kernel."""
        if self.collected:
            for follower in self._followers:
                if follower.connected:
                    with suppress(LinkClosed):
                        await follower.session.send(Channel.JOURNAL, m.encode(record))
            return
        record.number = self.journal.last + 1
        data = m.encode(record)
        if len(data) > MAX_MESSAGE:
            data = self._note(record.number, f"A message of {len(data)} bytes was left out.")
        self.journal.append(data)
        self._changed.set()
        while self._held_back():
            self._caught_up = anyio.Event()
            with anyio.move_on_after(1):
                await self._caught_up.wait()

    def tell(self, record: Record) -> None:
        """Pass news on to the clients that are there and keep up; it is not kept for others."""
        data = m.encode(record)
        for follower in self._followers:
            if follower.connected:
                with suppress(LinkClosed):
                    follower.session.send_nowait(Channel.METRICS, data)

    def _held_back(self) -> bool:
        """Whether the journal would drop what a client that is only slow has not been sent."""
        limit = self.journal.endangered
        return any(it.connected and it.reader.number < limit for it in self._followers)

    def admit(self, session: LinkSession, after: int, *, owns: bool, keeps: bool) -> Follower:
        """A new follower; one that owns the run takes it over from the one before."""
        for follower in self._followers:
            if follower.session is session:
                follower.dismiss()
            elif owns and follower.owns:
                follower.dismiss("Another client has taken the run over.")
        self._tidy()
        follower = Follower(session, self.journal, after, owns, keeps)
        self._followers.append(follower)
        return follower

    def leave(self, session: LinkSession) -> None:
        """This client follows the run no longer."""
        for follower in self._followers:
            if follower.session is session:
                follower.dismiss()
        self._tidy()

    def collect(self) -> None:
        """Somebody has all of the run. Who is there may read to the end; late messages still pass
        through to them. The journal goes."""
        self.collected = True
        (self.journal.folder / _INFO).unlink(missing_ok=True)
        for follower in self._followers:
            if not follower.connected:
                follower.dismiss("Another client has collected the run.")
        self._tidy()

    def _tidy(self) -> None:
        self._followers = [it for it in self._followers if it.active]
        self._changed.set()
        self._caught_up.set()
        if self.collected and not any(it.reading for it in self._followers):
            self.journal.remove()

    async def follow(self, follower: Follower) -> None:
        """Send a follower its messages, and what comes, until the run is collected or the follower
        has been dismissed."""
        with suppress(LinkClosed):
            while follower.active:
                if self._changed.is_set():
                    self._changed = anyio.Event()
                items = follower.reader.read()
                for item in items:
                    data = self._marker(item) if isinstance(item, Gap) else item
                    await follower.session.send(Channel.JOURNAL, data)
                self._caught_up.set()
                if not items:
                    if self.collected:
                        break
                    await self._changed.wait()
            if follower.farewell:
                content = json.dumps({"reason": follower.farewell}).encode()
                record = Record(self.info.kernel, self.info.run, 0, LEFT, content)
                await follower.session.send(Channel.JOURNAL, m.encode(record))
        follower.reading = False
        self._tidy()

    def _marker(self, gap: Gap) -> bytes:
        count = gap.last - gap.first + 1
        text = f"{count} messages of this run were dropped: its journal was full."
        return self._note(gap.last, text)

    def _note(self, number: int, text: str) -> bytes:
        content = json.dumps({"name": "stderr", "text": f"\n[{text}]\n"}).encode()
        return m.encode(Record(self.info.kernel, self.info.run, number, "stream", content))

    def save(self) -> None:
        """Leave a trace for an agent that comes after this one."""
        folder = self.journal.folder
        folder.mkdir(mode=0o700)
        (folder / _INFO).write_bytes(msgspec.json.encode(self.info))

    @classmethod
    def recover(cls, folder: Path) -> Run:
        """A run that an agent which is gone has left in this folder."""
        try:
            info = msgspec.json.decode((folder / _INFO).read_bytes(), type=m.RunInfo)
        except (msgspec.DecodeError, msgspec.ValidationError):  # the machine's power was cut
            info = m.RunInfo(folder.name, "", folder.stat().st_mtime)
        journal = Journal.recover(folder)
        segments = sorted(folder.glob("*.records"))
        info.ended = segments[-1].stat().st_mtime if segments else info.started
        end = _last(journal)
        if end is None or end.msg_type not in (RESULT, DIED):
            reason = "The machine's agent ended while it ran."
            content = json.dumps({"reason": reason, "status": "lost"}).encode()
            end = Record(info.kernel, info.run, journal.last + 1, DIED, content)
            journal.append(m.encode(end))
        info.status = status_after(end)
        return cls(info, journal)


class Runs:
    """All runs of a machine that have not been collected."""

    def __init__(self, folder: Path, journal_limit: int = LIMIT) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder = folder
        self._limit = journal_limit
        self._runs: dict[str, Run] = {}
        for it in sorted(folder.iterdir()):
            if (it / _INFO).exists():
                run = self._runs[it.name] = Run.recover(it)
                run.info.run = it.name
            else:
                shutil.rmtree(it, ignore_errors=True)

    def add(self, info: m.RunInfo) -> Run:
        """A new run, which will be found even by an agent after this one."""
        if not info.run.isalnum() or info.run in self._runs:
            raise RequestError(f"{info.run!r} cannot be the name of a run.")
        if info.label and any(run.info.label == info.label for run in self._live()):
            raise RequestError(
                f"There is a run {info.label!r} on this machine already.",
                hint="Collect it by `%remote attach`, cancel it, or choose another name.",
            )
        run = Run(info, Journal(self._folder / info.run, self._limit))
        run.save()
        self._runs[info.run] = run
        return run

    def get(self, run: str) -> Run | None:
        """The run of this id, if it has not been collected and forgotten."""
        return self._runs.get(run)

    def find(self, name: str) -> Run:
        """The run of this id or label. Raises :class:`RequestError`."""
        for run in self._live():
            if name in (run.info.run, run.info.label):
                return run
        raise RequestError(
            f"There is no run {name!r} on this machine.",
            hint="It may have been collected already; `%remote runs` lists what is there.",
        )

    def _live(self) -> list[Run]:
        return [run for run in self._runs.values() if not run.collected]

    def listed(self) -> Iterable[m.RunInfo]:
        """All that is running, waiting, or finished and not collected."""
        for run in self._live():
            run.info.messages = run.journal.last
            run.info.followed = run.owner is not None
            yield run.info

    def ended(self, run: Run, record: Record) -> None:
        """``record`` was the last one of a run."""
        run.info.status = status_after(record)
        run.info.ended = time.time()

    def collect(self, run: Run) -> None:
        """Its client has all of it."""
        run.collect()
        for name in [name for name, it in self._runs.items() if it.collected][:-32]:
            del self._runs[name]

    def forget(self, session: LinkSession) -> None:
        """A client is gone for good."""
        for run in self._runs.values():
            run.leave(session)

    def renounce(self, session: LinkSession) -> None:
        """A client wants nothing of what it follows any more."""
        for run in self._live():
            if run.owner is session:
                self.collect(run)


def status_after(end: Record) -> str:
    """How a run ended, by its last message."""
    content = json.loads(end.content)
    if end.msg_type == DIED:
        return str(content.get("status", "died"))
    if content.get("ename") == "KeyboardInterrupt":
        return "interrupted"
    return "done" if content["status"] == "ok" else "error"


def _last(journal: Journal) -> Record | None:
    reader = journal.reader(journal.last - 1)
    record = None
    while items := reader.read():
        record = items[-1]
    return decode_record(record) if isinstance(record, bytes) else None
