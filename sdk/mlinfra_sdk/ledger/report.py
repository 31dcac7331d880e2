"""What was spent, divided by day, notebook, machine, provider or run.

Every report divides the same sum: its rows always add up to what the machines cost in that time.
Time of machines in which no run went on has rows of its own where rows are runs or notebooks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import msgspec

from .ledger import Ledger
from .records import Machine, Run

IDLE = "(idle)"
"""The notebook of time in which no run went on."""
NO_NOTEBOOK = "(none)"
Label: TypeAlias = "str | int"


class Row(msgspec.Struct, frozen=True):
    """One line of a report: what it is about, micro-USD, seconds and how many runs began in it.

    Seconds are those of machines, and of runs where rows are runs or notebooks.
    """

    labels: dict[str, Label]
    cost: int
    seconds: float
    runs: int


def report(ledger: Ledger, by: str, *, since: float = 0.0, until: float | None = None) -> list[Row]:
    """The rows of a report by one of :data:`GROUPS` from ``since`` to ``until`` (Unix time;
    default: now), oldest or dearest first."""
    return _REPORTS[by](ledger, since, time.time() if until is None else until)


def _by_day(ledger: Ledger, since: float, until: float) -> list[Row]:
    starts = [it.started_at for it in ledger.machines() if it.started_at is not None]
    if not starts:
        return []
    began = [run.opened_at for run in ledger.runs(since=since)]
    rows = []
    for day, begin, end in _days(max(since, min(starts)), until):
        cost = ledger.cost(since=begin, until=end)
        runs = sum(begin <= moment < end for moment in began)
        if cost.seconds or runs:
            rows.append(Row({"day": day}, cost.total, cost.seconds, runs))
    return rows


def _days(since: float, until: float) -> Iterator[tuple[str, float, float]]:
    """Days of local time: their date, begin and end; the first and last may be cut."""
    while since < until:
        date = time.localtime(since)
        midnight = time.mktime((date.tm_year, date.tm_mon, date.tm_mday + 1, 0, 0, 0, 0, 0, -1))
        end = min(midnight, until)
        yield time.strftime("%Y-%m-%d", date), since, end
        since = end


def _by_machine(ledger: Ledger, since: float, until: float) -> list[Row]:
    rows = []
    for machine in ledger.machines():
        cost = ledger.cost(machine.id, since=since, until=until)
        if cost.seconds:
            runs = len(ledger.runs(machine.id, since=since))
            rows.append(Row(_machine_labels(machine), cost.total, cost.seconds, runs))
    return rows


def _machine_labels(machine: Machine) -> dict[str, Label]:
    gpu = f"{machine.gpu}:{machine.gpu_count}" if machine.gpu_count > 1 else machine.gpu
    return {"machine": machine.name, "provider": machine.provider, "gpu": gpu or "none"}


def _by_provider(ledger: Ledger, since: float, until: float) -> list[Row]:
    rows: dict[str, Row] = {}
    for row in _by_machine(ledger, since, until):
        _add(rows, str(row.labels["provider"]), {"provider": row.labels["provider"]}, row)
    return _dearest_first(rows)


def _by_run(ledger: Ledger, since: float, until: float) -> list[Row]:
    """Runs that took time then, whenever they began, and for each machine its idle time."""
    machines = {machine.id: machine for machine in ledger.machines()}
    rows = []
    for machine in machines.values():
        cost = ledger.cost(machine.id, since=since, until=until)
        for run in ledger.runs(machine.id):
            seconds = _seconds_within(run, since, until)
            if run.id in cost.runs or (since <= run.opened_at < until):
                rows.append(Row(_run_labels(run, machine), cost.runs.get(run.id, 0), seconds, 1))
        if cost.idle:
            labels = {"run": "", "began": "", "notebook": IDLE, "machine": machine.name}
            rows.append(Row({**labels, "kind": "", "status": ""}, cost.idle, 0.0, 0))
    return rows


def _run_labels(run: Run, machine: Machine) -> dict[str, Label]:
    return {
        "run": run.id,
        "began": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.opened_at)),
        "notebook": run.notebook or NO_NOTEBOOK,
        "machine": machine.name,
        "kind": run.kind,
        "status": run.status,
    }


def _seconds_within(run: Run, since: float, until: float) -> float:
    end = until if run.seconds is None else run.opened_at + run.seconds
    return max(0.0, min(end, until) - max(run.opened_at, since))


def _by_notebook(ledger: Ledger, since: float, until: float) -> list[Row]:
    rows: dict[str, Row] = {}
    for row in _by_run(ledger, since, until):
        notebook = row.labels["notebook"]
        _add(rows, str(notebook), {"notebook": notebook}, row)
    return _dearest_first(rows)


def _add(rows: dict[str, Row], key: str, labels: dict[str, Label], row: Row) -> None:
    known = rows.get(key, Row(labels, 0, 0.0, 0))
    rows[key] = Row(
        labels, known.cost + row.cost, known.seconds + row.seconds, known.runs + row.runs
    )


def _dearest_first(rows: dict[str, Row]) -> list[Row]:
    return sorted(rows.values(), key=lambda row: (-row.cost, -row.seconds))


_REPORTS: dict[str, Callable[[Ledger, float, float], list[Row]]] = {
    "day": _by_day,
    "notebook": _by_notebook,
    "machine": _by_machine,
    "provider": _by_provider,
    "run": _by_run,
}
GROUPS = tuple(_REPORTS)
"""What a report can be divided by."""
