"""What was asked for by a run that nobody waits for: enough to ask for it once more."""

from __future__ import annotations

import os
import secrets
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import psutil

from mlinfra_sdk import paths, units
from mlinfra_sdk.errors import LinkClosed, RunDetached, StoreError
from mlinfra_sdk.frontend import Console, Frontend
from mlinfra_sdk.jobs.background import Background
from mlinfra_sdk.namespace.delta import Inputs
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.safekeeping import Safe
from mlinfra_sdk.spec import Request
from mlinfra_sdk.worker.records import Record

if TYPE_CHECKING:
    from mlinfra_sdk.machines.client import AgentClient
    from mlinfra_sdk.machines.lifecycle import LiveMachine


@dataclass(eq=False)
class Job:
    """A run in the background, or a detached one (without ``frontend`` and ``background``), and
    all that it needs, as it was at its start. ``modules`` are those that it imports."""

    code: str
    count: int
    label: str
    cell: str
    own_kernel: bool
    request: Request
    frontend: Frontend | None
    background: Background | None = None
    inputs: Inputs = field(default_factory=Inputs)
    modules: frozenset[str] = frozenset()
    safe: Safe = field(default_factory=Safe)
    run: str = ""
    """Its present attempt."""
    ledger_run: int = 0
    began: float = 0.0
    machine: LiveMachine | None = None
    watched: bool = False
    """Whether its session hears of its end, and sees to what comes then."""
    failed: BaseException | None = None
    """Why nothing more comes of it."""

    def hold(self, store: ChunkStore) -> None:
        """Keep the chunks of its inputs in the store for as long as this object lives. Raises
        :class:`StoreError`."""
        folder = paths.data_dir() / "jobs"
        owner = folder / f"{os.getpid()}-{secrets.token_hex(4)}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            for path in folder.iterdir():
                pid = path.name.partition("-")[0]
                if pid.isdecimal() and not psutil.pid_exists(int(pid)):  # it was killed
                    path.unlink(missing_ok=True)
            owner.touch(mode=0o600)
        except OSError as error:
            raise StoreError(
                f"{folder} cannot be written to: {error.strerror}.", hint="Free some space there."
            ) from error
        weakref.finalize(self, _unlink, owner, os.getpid())
        store.pin(f"job-{owner.name}", self.inputs.digests(), owner)

    @property
    def name(self) -> str:
        """What it is called on the machine: its attempts have names of their own."""
        return self.label or self.run

    def cost(self, seconds: float) -> int:
        """Micro-USD of so many seconds of it, as far as the price is known."""
        if self.machine is None or not self.machine.offer.price.known:
            return 0
        return units.cost(self.machine.offer.price.micro_per_hour, seconds)

    async def take(self, record: Record) -> None:
        """What it publishes before its end. Of a detached run that is in its journal."""
        if self.background is not None:
            await self.background.sink(record)

    def fail(self, error: BaseException) -> None:
        """Nothing more comes of it here; elsewhere it may go on."""
        self.watched = False
        if not isinstance(error, RunDetached):
            self.failed = error
        if self.background is not None:
            self.background.fail(error)

    def say(self, text: str) -> None:
        """In the midst of its outputs, if they are shown."""
        if self.frontend is not None:
            content = msgspec.json.encode({"name": "stderr", "text": text})
            self.frontend.publish(Record("", self.run, 0, "stream", content))


def _unlink(owner: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in a fork
        owner.unlink(missing_ok=True)


class LostJob(NamedTuple):
    """One that was cut off: by what its machine said at its end, or because the link is closed."""

    job: Job
    client: AgentClient
    end: Record | LinkClosed


class Unseen(Console):
    """The front end of a detached run: ``notes`` are kept for its journal."""

    allow_stdin = False

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def publish(self, record: Record) -> None:
        """Not shown."""

    def detail(self, text: str) -> None:
        """Not shown."""

    def note(self, text: str) -> None:
        """Kept."""
        self.notes.append(text)
