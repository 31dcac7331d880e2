"""What a cell has taken before, and so what it may take again."""

from __future__ import annotations

import math
import statistics
import time

import blake3
import msgspec

from mlinfra_sdk import units
from mlinfra_sdk.catalog import Gpu

from .ledger import Ledger

_DAYS = 180
_MOST = 10
"""So many of the latest runs count: a cell may have become slower or faster."""


class Estimate(msgspec.Struct, frozen=True):
    """What the next run of a cell may take: ``seconds``, and the standard deviation that a single
    further run has by the ``runs`` before; None if there was only one."""

    seconds: float
    error: float | None
    runs: int

    def describe(self, micro_per_hour: int | None) -> str:
        """``Estimate by 4 earlier runs: 2m40s ± 20s, $0.05 ± $0.01.``"""
        earlier = "1 earlier run" if self.runs == 1 else f"{self.runs} earlier runs"
        took = units.format_duration(self.seconds)
        if self.error is not None:
            took += f" ± {units.format_duration(self.error)}"
        money = ""
        if micro_per_hour is not None:
            money = f", {units.format_usd(units.cost(micro_per_hour, self.seconds))}"
            if self.error is not None:
                money += f" ± {units.format_usd(units.cost(micro_per_hour, self.error))}"
        doubt = " (its error is not known)" if self.error is None else ""
        return f"Estimate by {earlier} of this cell: {took}{money}{doubt}."


def cell_key(code: str) -> str:
    """What the ledger calls a cell: a digest of its code, whatever spaces end its lines."""
    lines = "\n".join(line.rstrip() for line in code.strip().splitlines())
    return blake3.blake3(lines.encode()).hexdigest(length=8) if lines else ""


def estimate(ledger: Ledger, notebook: str, cell: str, gpu: Gpu | None) -> Estimate | None:
    """By the latest runs of this cell that succeeded on the same accelerators; None if there is
    none."""
    if not cell:
        return None
    name, count = (gpu.name, gpu.count) if gpu is not None else ("", 0)
    alike = {it.id for it in ledger.machines() if (it.gpu, it.gpu_count) == (name, count)}
    taken = [
        run.seconds
        for run in ledger.runs(since=time.time() - _DAYS * 86400)
        if (run.notebook, run.cell, run.status) == (notebook, cell, "done")
        and run.machine_id in alike
        and run.seconds is not None
    ][-_MOST:]
    if not taken:
        return None
    error = None
    if len(taken) > 1:
        error = statistics.stdev(taken) * math.sqrt(1 + 1 / len(taken))
    return Estimate(statistics.fmean(taken), error, len(taken))
