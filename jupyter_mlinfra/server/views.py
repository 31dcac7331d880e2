"""Records of the ledger, and what agents add to them, as the server shows them."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from mlinfra_sdk import units
from mlinfra_sdk.ledger import Cost, Ledger
from mlinfra_sdk.ledger import Machine as MachineRecord
from mlinfra_sdk.ledger import Run as RunRecord
from mlinfra_sdk.machines import claim
from mlinfra_sdk.worker.messages import RunInfo

from .messages import End, Machine, Progress, Run
from .observers import Observer, Observers

_RECENT = 500
"""Runs among which the open ones are looked for."""


class Books(NamedTuple):
    """What the ledger says at the instant ``now``, as far as it concerns what goes on."""

    now: float
    version: int
    machines: list[MachineRecord]
    costs: dict[str, Cost]
    runs: list[RunRecord]
    notebooks: dict[str, str]
    today: int
    month: int
    total: int


def read(ledger: Ledger) -> Books:
    """Read the ledger; takes some time when it is large."""
    version, now = ledger.version(), time.time()
    date = time.localtime(now)
    midnight = time.mktime((*date[:3], 0, 0, 0, 0, 0, -1))
    month = time.mktime((*date[:2], 1, 0, 0, 0, 0, 0, -1))
    machines = ledger.machines(active=True)
    recent = ledger.latest_runs(_RECENT)
    notebooks: dict[str, str] = {}
    for run in recent:
        notebooks.setdefault(run.machine_id, run.notebook)
    return Books(
        now,
        version,
        machines,
        {machine.id: ledger.cost(machine.id, until=now) for machine in machines},
        recent,
        notebooks,
        ledger.cost(since=midnight, until=now).total,
        ledger.cost(since=month, until=now).total,
        ledger.cost(until=now).total,
    )


class Views:
    """Makes what is shown; ``root`` is the server's folder, below which notebooks have a path."""

    def __init__(self, root: str, observers: Observers) -> None:
        self._root = Path(root).expanduser().resolve()
        self._observers = observers

    def machine(self, machine: MachineRecord, cost: Cost, notebook: str) -> Machine:
        """A machine, with what its agent says if that is asked."""
        known = machine.price.known
        shown = Machine(
            id=machine.id,
            name=machine.name,
            target=machine.provider,
            gpu=machine.gpu,
            gpu_count=machine.gpu_count,
            state=_state(machine),
            notebook=notebook,
            path=self.path(notebook),
            intended_at=machine.intended_at,
            started_at=machine.started_at,
            stopped_at=machine.stopped_at,
            stop_reason=machine.stop_reason,
            usd_per_hour=machine.price.micro_per_hour / units.MICRO if known else None,
            price=machine.price.describe(),
            usd=cost.total / units.MICRO if known else None,
            idle_usd=cost.idle / units.MICRO if known else None,
        )
        if shown.state == "starting":
            shown.waits = claim.said(machine.name)
        elif shown.state == "running":
            command = [sys.executable, "-m", "mlinfra_sdk.cli", "shell", machine.name]
            shown.shell = shlex.join(command)
        observer = self._observers.get(machine.id)
        if observer is not None:
            _observe(shown, observer)
        return shown

    def run(self, run: RunRecord, machine: MachineRecord, cost: int) -> Run:
        """A run, with what its machine says of it if that is asked."""
        shown = Run(
            id=str(run.id),
            name="",
            kind=run.kind,
            title="",
            machine=machine.name,
            machine_id=machine.id,
            target=machine.provider,
            notebook=run.notebook,
            path=self.path(run.notebook),
            status=run.status,
            opened_at=run.opened_at,
            seconds=run.seconds,
            usd=cost / units.MICRO if machine.price.known else None,
            bytes_up=run.bytes_up,
            bytes_down=run.bytes_down,
        )
        info = self.live(machine.id).get(run.id)
        if info is not None:
            _add(shown, info)
        return shown

    def live(self, machine_id: str) -> dict[int, RunInfo]:
        """What a machine says of the runs that it still has, by their numbers in the ledger."""
        observer = self._observers.get(machine_id)
        latest = observer.latest if observer is not None else None
        return {info.ledger: info for info in latest.runs if info.ledger} if latest else {}

    def going_on(self, books: Books, machines: Mapping[str, MachineRecord]) -> list[Run]:
        """Runs that are open or not collected, newest first."""
        live = {number for it in books.machines for number in self.live(it.id)}
        return [
            self.run(run, machines[run.machine_id], _cost_of(run, books.costs))
            for run in books.runs
            if run.machine_id in machines and (run.seconds is None or run.id in live)
        ]

    def path(self, notebook: str) -> str:
        """A notebook's path as the contents API has it; empty if it lies elsewhere."""
        if not notebook:
            return ""
        try:
            return (self._root / notebook).resolve().relative_to(self._root).as_posix()
        except (ValueError, OSError):
            return ""

    def folder(self, path: str) -> Path | None:
        """A folder below the root; None if there is none."""
        try:
            found = (self._root / path.lstrip("/")).resolve()
            return found if found.is_relative_to(self._root) and found.is_dir() else None
        except (ValueError, OSError):
            return None


def _cost_of(run: RunRecord, costs: Mapping[str, Cost]) -> int:
    cost = costs.get(run.machine_id)
    return cost.runs.get(run.id, 0) if cost is not None else 0


def _state(machine: MachineRecord) -> str:
    if machine.stopped_at is not None:
        return "ended"
    return "starting" if machine.started_at is None else "running"


def _observe(machine: Machine, observer: Observer) -> None:
    machine.usage = list(observer.usage)
    machine.problem = observer.problem
    latest = observer.latest
    if latest is None:
        machine.reachable = False if observer.problem else None
        return
    machine.reachable = True
    machine.busy = latest.busy
    machine.idle_seconds = latest.idle_seconds
    machine.ends = [End(it.cause, observer.at + it.seconds, it.reason) for it in latest.ends]


def _add(run: Run, info: RunInfo) -> None:
    run.live = True
    run.name = info.label or info.run
    run.title = info.title
    run.status = info.status
    run.followed = info.followed
    run.messages = info.messages
    loop = info.progress
    if loop is not None:
        run.progress = Progress(loop.label, loop.unit, loop.done, loop.total, loop.left)
    if info.ended:
        run.seconds = info.ended - info.started


def by_id(machines: Iterable[MachineRecord]) -> dict[str, MachineRecord]:
    """Machines by their ids."""
    return {machine.id: machine for machine in machines}
