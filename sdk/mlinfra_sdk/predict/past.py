"""Predictions by what the ledger knows of runs."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mlinfra_sdk.ledger import Ledger, Run

from .calibration import Calibration
from .hardware import Guess, Used, guess
from .model import Prediction, predict
from .places import Past, Place

_DAYS = 180
_MEMORY_BUSY = 70.0


def estimate(
    ledger: Ledger,
    notebook: str,
    cell: str,
    places: Sequence[Place],
    *,
    here: Calibration | None = None,
    local: Sequence[Past] = (),
) -> list[Prediction | None]:
    """What the next run of a cell (a ``cell_key``) of a notebook will take at each place. ``local``
    are runs that the ledger does not know, of cells in the notebook's own kernel; their ``cell`` is
    a ``cell_key``, too."""
    if not cell:
        return [None] * len(places)
    runs = _runs(ledger)
    wanted = _key(notebook, cell)
    past = [Past(_key(run.notebook, run.cell), place, run.seconds or 0.0) for run, place in runs]
    past += [Past(_key(notebook, it.cell), it.place, it.seconds) for it in local]
    own = {place.kind: run.id for run, place in runs if _key(run.notebook, run.cell) == wanted}
    used = {kind: _used(ledger, run) for kind, run in own.items()}
    used |= {it.place.kind: it.used for it in local if it.cell == cell}
    cores: dict[Place, float | None] = {}

    def cores_of(place: Place) -> float | None:
        if place.kind not in cores:
            latest = [run.id for run, where in runs if where.kind == place.kind][-3:]
            found = (_used(ledger, run).cores_here for run in reversed(latest))
            cores[place.kind] = next((it for it in found if it), None)
        return cores[place.kind]

    def guesses(one: Place, other: Place) -> Guess | None:
        return guess(used.get(one, Used()), one.gpu, other.gpu, cores_of(other), here)

    return [predict(wanted, place, past, guesses) for place in places]


def _key(notebook: str, cell: str) -> str:
    return f"{cell} of {notebook}"


def _runs(ledger: Ledger) -> list[tuple[Run, Place]]:
    machines = {it.id: Place(it.provider, it.gpu, it.gpu_count) for it in ledger.machines()}
    return [
        (run, machines[run.machine_id])
        for run in ledger.runs(since=time.time() - _DAYS * 86400)
        if run.status == "done" and run.cell and run.seconds is not None
    ]


def _used(ledger: Ledger, run: int) -> Used:
    figures = {it.name: it.value for it in ledger.measurements(run)}
    busy = figures.get("gpu_utilization")
    return Used(
        figures.get("cores_mean"),
        figures.get("cores_here"),
        None if busy is None else busy / 100,
        figures.get("gpu_memory_utilization", 0.0) >= _MEMORY_BUSY,
    )
