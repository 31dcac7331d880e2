"""Times of a cell as a distribution: logarithms that are normal, with what is known in advance.

A cell that has run on such a machine takes what it took, give or take what this user's runs differ
from each other. One that has run elsewhere takes that, times the ratio of the machines: as other
cells have shown it that ran on both, before that as figures of their hardware suggest. Each run
makes spread and ratios better known.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mlinfra_sdk import units

from .hardware import Guess
from .places import Past, Place

LATEST = 10
"""So many of a cell's latest runs count: it may have become slower or faster."""
_REPEAT, _REPEAT_WEIGHT = 0.15, 5
"""How much runs of one cell on one machine differ, and how many runs that assumption is worth."""
_CELLS, _CELLS_WEIGHT = 0.35, 3
"""The same of the ratio of two machines from cell to cell."""
_EIGHTY = statistics.NormalDist().inv_cdf(0.9)

Guesses = Callable[[Place, Place], "Guess | None"]


@dataclass(frozen=True)
class Prediction:
    """An estimate: in 8 of 10 cases between ``low`` and ``high`` seconds, as often above
    ``seconds`` as below. ``basis`` says what it rests on."""

    seconds: float
    low: float
    high: float
    basis: str

    def describe(self, micro_per_hour: int | None) -> str:
        """``Estimate from 4 runs of this cell on A10: 2m40s (2m20s to 3m), $0.05 ($0.04 to
        $0.06).``"""
        said = f"Estimate from {self.basis}: {self.in_words()}"
        if micro_per_hour is not None:
            said += f", {self.money(micro_per_hour)}"
        return f"{said}."

    def in_words(self) -> str:
        """The times."""
        low, mid, high = map(units.format_duration, (self.low, self.seconds, self.high))
        return f"{mid} ({low} to {high})"

    def money(self, micro_per_hour: int) -> str:
        """What they cost."""
        low, mid, high = (
            units.format_usd(units.cost(micro_per_hour, it))
            for it in (self.low, self.seconds, self.high)
        )
        return f"{mid} ({low} to {high})"


def predict(
    cell: str, place: Place, past: Sequence[Past], guesses: Guesses = lambda one, other: None
) -> Prediction | None:
    """What the cell will take there, by the runs of all cells, the oldest first; None: it has never
    run. ``guesses`` are ratios of machines by their figures."""
    groups = _groups(past)
    own = {where: found for (which, where), found in groups.items() if which == cell}
    if not own:
        return None
    repeat = _repeat(list(groups.values()))
    if place.kind in own:
        found = own[place.kind]
        count = len(found)
        runs = "1 run" if count == 1 else f"{count} runs"
        deviation = _own_deviation(found, repeat) * math.sqrt(1 + 1 / count)
        return _prediction(
            statistics.fmean(found), deviation, f"{runs} of this cell on {place.name}"
        )
    best: Prediction | None = None
    narrowest = math.inf
    for where, found in own.items():
        scaled = _scaled(cell, where, place, found, groups, repeat, guesses)
        if scaled is not None and scaled[1] < narrowest:
            narrowest = scaled[1]
            best = _prediction(*scaled)
    return best


def _groups(past: Sequence[Past]) -> dict[tuple[str, Place], list[float]]:
    """Logarithms of the latest times of each cell at each kind of machine."""
    found: dict[tuple[str, Place], list[float]] = {}
    for run in past:
        if run.seconds > 0:
            found.setdefault((run.cell, run.place.kind), []).append(math.log(run.seconds))
    return {key: times[-LATEST:] for key, times in found.items()}


def _repeat(groups: Sequence[Sequence[float]]) -> float:
    """The deviation of one more run of a cell, as all cells show it."""
    squares, free = _REPEAT_WEIGHT * _REPEAT**2, float(_REPEAT_WEIGHT)
    for times in groups:
        mean = statistics.fmean(times)
        squares += sum((it - mean) ** 2 for it in times)
        free += len(times) - 1
    return math.sqrt(squares / free)


def _own_deviation(times: Sequence[float], repeat: float) -> float:
    mean = statistics.fmean(times)
    squares = _REPEAT_WEIGHT * repeat**2 + sum((it - mean) ** 2 for it in times)
    return math.sqrt(squares / (_REPEAT_WEIGHT + len(times) - 1))


def _scaled(
    cell: str,
    where: Place,
    place: Place,
    times: Sequence[float],
    groups: Mapping[tuple[str, Place], Sequence[float]],
    repeat: float,
    guesses: Guesses,
) -> tuple[float, float, str] | None:
    """Mean, deviation and basis by runs elsewhere."""
    shown = [
        statistics.fmean(there) - statistics.fmean(groups[other, where])
        for (other, at), there in groups.items()
        if at == place.kind and other != cell and (other, where) in groups
    ]
    guess = guesses(where, place)
    basis = f"{'1 run' if len(times) == 1 else f'{len(times)} runs'} on {where.name}"
    noise = _own_deviation(times, repeat) ** 2 / len(times) + repeat**2
    if not shown:
        if guess is None:
            return None
        return (
            statistics.fmean(times) + guess.mean,
            math.sqrt(guess.deviation**2 + noise),
            f"{basis} and {guess.basis}",
        )
    mean = statistics.fmean(shown)
    squares = _CELLS_WEIGHT * _CELLS**2 + sum((it - mean) ** 2 for it in shown)
    cells = squares / (_CELLS_WEIGHT + len(shown) - 1)
    known = len(shown) / cells
    before = 1 / guess.deviation**2 if guess is not None else 0.0
    ratio = (known * mean + (before * guess.mean if guess is not None else 0.0)) / (known + before)
    others = "1 other cell" if len(shown) == 1 else f"{len(shown)} other cells"
    return (
        statistics.fmean(times) + ratio,
        math.sqrt(1 / (known + before) + cells + noise),
        f"{basis} and {others} that ran on both",
    )


def _prediction(mean: float, deviation: float, basis: str) -> Prediction:
    spread = _EIGHTY * deviation
    return Prediction(math.exp(mean), math.exp(mean - spread), math.exp(mean + spread), basis)
