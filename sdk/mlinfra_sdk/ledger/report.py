"""What was spent, divided by day, notebook, machine, provider or run.

Every report divides the same sum: its rows always add up to what the machines cost in that time.
Time of machines in which no run went on has rows of its own where rows are runs or notebooks.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import msgspec

from .attribution import Cost
from .ledger import Costs, Ledger
from .records import Machine, Run

IDLE = "(idle)"
"""The notebook of time in which no run went on."""
NO_NOTEBOOK = "(none)"
Label: TypeAlias = "str | int"


class Row(msgspec.Struct, frozen=True):
    """One line of a report: what it is about, micro-USD, seconds and how many runs began in it.

    ``cost`` is the estimate, ``billed`` what providers have billed so far (None: nothing), and
    ``best`` the bill of those machines that have one with the estimate of the others. Seconds are
    those of machines, and of runs where rows are runs or notebooks.
    """

    labels: dict[str, Label]
    cost: int
    seconds: float
    runs: int
    billed: int | None
    best: int


def report(ledger: Ledger, by: str, *, since: float = 0.0, until: float | None = None) -> list[Row]:
    """The rows of a report by one of :data:`GROUPS` from ``since`` to ``until`` (Unix time;
    default: now), oldest or dearest first."""
    return _REPORTS[by](ledger, since, time.time() if until is None else until)


def _by_day(ledger: Ledger, since: float, until: float) -> list[Row]:
    starts = [it.intended_at for it in ledger.machines()]
    if not starts:
        return []
    began = [run.opened_at for run in ledger.runs(since=since)]
    rows = []
    # What is added at an instant counts behind the beginning of its period: a second before all.
    for day, begin, end in _days(max(since, min(starts) - 1), until):
        costs = ledger.costs(since=begin, until=end)
        runs = sum(begin <= moment < end for moment in began)
        if _counts(costs) or runs:
            rows.append(_row({"day": day}, costs, costs.estimate.seconds, runs))
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
        costs = ledger.costs(machine.id, since=since, until=until)
        if _counts(costs):
            runs = len(ledger.runs(machine.id, since=since))
            rows.append(_row(_machine_labels(machine), costs, costs.estimate.seconds, runs))
    return rows


def _counts(costs: Costs) -> bool:
    """Whether there is time or money in it."""
    return bool(costs.estimate.seconds or costs.estimate.total or costs.best.total)


def _row(
    labels: Mapping[str, Label],
    costs: Costs,
    seconds: float,
    runs: int,
    part: Callable[[Cost], int] = lambda cost: cost.total,
) -> Row:
    billed = part(costs.billed) if costs.billed.seconds else None
    return Row(dict(labels), part(costs.estimate), seconds, runs, billed, part(costs.best))


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
        costs = ledger.costs(machine.id, since=since, until=until)
        for run in ledger.runs(machine.id):
            seconds = _seconds_within(run, since, until)
            if run.id in costs.best.runs or (since <= run.opened_at < until):
                part = functools.partial(_of_run, run.id)
                rows.append(_row(_run_labels(run, machine), costs, seconds, 1, part))
        if costs.best.idle or costs.estimate.idle:
            labels = {"run": "", "began": "", "notebook": IDLE, "machine": machine.name}
            labels = {**labels, "kind": "", "status": ""}
            rows.append(_row(labels, costs, 0.0, 0, lambda cost: cost.idle))
    return rows


def _of_run(run: int, cost: Cost) -> int:
    return cost.runs.get(run, 0)


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
    known = rows.get(key, Row(labels, 0, 0.0, 0, None, 0))
    told = [it.billed for it in (known, row) if it.billed is not None]
    rows[key] = Row(
        labels,
        known.cost + row.cost,
        known.seconds + row.seconds,
        known.runs + row.runs,
        sum(told) if told else None,
        known.best + row.best,
    )


def _dearest_first(rows: dict[str, Row]) -> list[Row]:
    return sorted(rows.values(), key=lambda row: (-row.best, -row.seconds))


_REPORTS: dict[str, Callable[[Ledger, float, float], list[Row]]] = {
    "day": _by_day,
    "notebook": _by_notebook,
    "machine": _by_machine,
    "provider": _by_provider,
    "run": _by_run,
}
GROUPS = tuple(_REPORTS)
"""What a report can be divided by."""
