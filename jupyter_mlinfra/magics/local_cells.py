"""How long cells take in the notebook's own kernel: what predictions for machines begin with.

Kept in this process only, by digest.
"""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

from mlinfra_sdk.ledger.history import cell_key
from mlinfra_sdk.predict import Past, Place, Used
from mlinfra_sdk.worker.readings import cores_here

_SHORTEST = 1.0
"""Seconds below which a cell is nothing that a machine would be rented for."""
_MOST = 200
_TITLE = 40


class LocalCells:
    """Runs of cells here, and which cell of the notebook ran last, here or on a machine."""

    def __init__(self) -> None:
        self.past: list[Past] = []
        self.latest = ("", "")
        """The key of the cell, and its first line."""
        self._began: tuple[float, float] | None = None

    def begin(self) -> None:
        """A cell begins."""
        self._began = (time.perf_counter(), _worked())

    def remote(self, cell: str) -> None:
        """The cell that has begun runs on a machine."""
        self._began = None
        self.latest = cell_key(cell), _title(cell)

    def end(self, cell: str, succeeded: bool) -> Past | None:
        """It has ended; gives its run if that is remembered."""
        began, self._began = self._began, None
        if began is None or not succeeded or cell.lstrip().startswith(("%remote", "%%")):
            return None
        seconds = time.perf_counter() - began[0]
        if seconds < _SHORTEST or _uses_gpu():
            return None
        cores = max(0.0, _worked() - began[1]) / seconds
        key = cell_key(cell)
        self.latest = key, _title(cell)
        run = Past(key, Place("local"), seconds, Used(cores, cores_here()))
        self.past = [*self.past, run][-_MOST:]
        return run

    def first(self, run: Past) -> bool:
        """Whether this cell is remembered for the first time."""
        return sum(it.cell == run.cell for it in self.past) == 1


def _title(cell: str) -> str:
    lines = [it.strip() for it in cell.splitlines()]
    first = next((it for it in lines if it and not it.startswith(("#", "%", "import", "from"))), "")
    return first if len(first) <= _TITLE else first[: _TITLE - 1] + "…"


def _worked() -> float:
    """Seconds that processors have worked for this process and its children that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(it.ru_utime + it.ru_stime for it in map(resource.getrusage, kinds))


def _uses_gpu() -> bool:
    """Whether it is not the processor alone that has worked here."""
    torch: Any = sys.modules.get("torch")
    try:
        return bool(torch is not None and torch.cuda.is_initialized())
    except Exception:
        return False
