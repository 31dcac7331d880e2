"""What a comparison has found, each figure with how it is known."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import msgspec

from mlinfra_sdk import units
from mlinfra_sdk.worker.run_usage import DISTURBED, Loop, RunUsage

Kind = Literal["measured", "sourced", "estimated"]

WARM_UP_RULE = (
    "Rates leave out the first tenth of a loop's time, at least one second of reading; times of"
    " phases leave out nothing."
)
CLEAR = 1.05
"""A ratio of rates below this is no difference that could be relied on."""
PHASES = ("start", "environment", "data", "compute")


class Figure(NamedTuple):
    """A number with its unit, and how it is known; ``source`` says by what, ``spread`` is a
    standard deviation."""

    value: float
    unit: str
    kind: Kind
    source: str = ""
    spread: float | None = None

    def __str__(self) -> str:
        sign = "~" if self.kind == "estimated" else ""
        if self.unit == "s":
            text = units.format_duration(self.value)
        elif self.unit == "B":
            text = units.format_size(int(self.value))
        elif self.unit == "USD":
            text = units.format_usd(round(self.value * units.MICRO))
        else:
            text = (
                f"{self.value:.3g} {self.unit}"
                if self.value < 1000
                else f"{self.value:,.0f} {self.unit}"
            )
        spread = f" ± {self.spread:.2g}" if self.spread is not None else ""
        return f"{sign}{text}{spread}"


@dataclass
class Trial:
    """One run of the work. ``seconds`` of each phase that it went through; ``results`` are its
    value (``_``) and the variables that it bound or changed."""

    seconds: dict[str, float] = field(default_factory=dict)
    usage: RunUsage | None = None
    results: dict[str, Any] = field(default_factory=dict)
    output: str = ""
    error: str = ""

    @property
    def total(self) -> float:
        """Seconds from door to door."""
        return sum(self.seconds.values())


@dataclass
class TargetResult:
    """All trials on one target. ``rate``: micro-USD per hour by ``price_source``, None if nobody
    states a price; ``phase`` is what it is at while it goes on."""

    target: str
    gpu: str = ""
    machine: str = ""
    rate: int | None = 0
    price_source: str = ""
    trials: list[Trial] = field(default_factory=list)
    phase: str = "waiting"
    error: str = ""
    differences: list[str] = field(default_factory=list)
    compared: int = 0
    """Results that could be compared with those of the first target."""
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The target and what it has."""
        return f"{self.target} {self.gpu}".strip()

    @property
    def done(self) -> bool:
        """Whether it has at least one result."""
        return any(not trial.error for trial in self.trials)

    def good(self) -> list[Trial]:
        """The trials without an error."""
        return [trial for trial in self.trials if not trial.error]

    def seconds(self, phase: str) -> Figure | None:
        """Of a phase: of the first trial for what only that goes through, else the median."""
        found = [trial.seconds[phase] for trial in self.good() if phase in trial.seconds]
        if not found:
            return None
        if phase != "compute":
            found = found[:1]
        spread = statistics.stdev(found) if len(found) > 2 else None
        return Figure(statistics.median(found), "s", "measured", "clock of this computer", spread)

    @property
    def first_result(self) -> Figure | None:
        """Seconds from nothing to the result."""
        good = self.good()
        return Figure(good[0].total, "s", "measured", "clock of this computer") if good else None

    def loops(self) -> list[Loop]:
        """Of the trial whose rate is the median, by kind: the outermost first."""
        found: dict[tuple[str, str, bool], list[Loop]] = {}
        for trial in self.good():
            for loop in trial.usage.loops if trial.usage else ():
                found.setdefault((loop.label, loop.unit, loop.nested), []).append(loop)
        middle = [sorted(of, key=lambda loop: loop.rate)[len(of) // 2] for of in found.values()]
        return sorted(middle, key=lambda loop: loop.nested)

    def figures(self) -> dict[str, Figure]:
        """All that is known of this target alone."""
        found: dict[str, Figure] = {}
        first = self.first_result
        if first is not None:
            found["first_result"] = first
        for phase in PHASES:
            seconds = self.seconds(phase)
            if seconds is not None:
                found[phase] = seconds
        for loop in self.loops():
            name = f"rate:{loop.label or loop.unit}"
            found[name] = Figure(loop.rate, f"{loop.unit}/s", "measured", loop.source, loop.spread)
        found |= self._of_usage()
        if first is not None and self.rate is not None:
            kind: Kind = "estimated" if self.rate else "measured"
            source = self.price_source or "this computer costs nothing more"
            spent = units.cost(self.rate, first.value) / units.MICRO
            found["cost"] = Figure(spent, "USD", kind, source)
            work = self.work()
            if work is not None and self.rate:
                each = units.cost(self.rate, 3600.0) / units.MICRO / 3600 / work[1]
                found[f"cost_per_{work[0]}"] = Figure(each, "USD", "estimated", source)
        return found

    def _of_usage(self) -> dict[str, Figure]:
        usages = [trial.usage for trial in self.good() if trial.usage and trial.usage.readings]
        if not usages:
            return {}
        usage = usages[len(usages) // 2]
        proc, nvml = "/proc of the machine", "NVML of the machine"
        found = {
            "cores": Figure(usage.cores, f"of {usage.cores_here} cores", "measured", proc),
            "memory_peak": Figure(usage.memory_peak, "B", "measured", proc),
        }
        if usage.gpu_busy is not None:
            found["gpu_busy"] = Figure(usage.gpu_busy, "%", "measured", nvml)
        if usage.gpu:
            found["gpu_memory_peak"] = Figure(usage.gpu_memory_peak, "B", "measured", nvml)
        if usage.joules is not None:
            found["gpu_energy"] = Figure(usage.joules / 3600, "Wh", "measured", nvml)
        return found

    @property
    def bound(self) -> str:
        """What the work waited for, with the evidence."""
        for trial in self.good():
            if trial.usage and trial.usage.bound:
                return f"{trial.usage.bound} ({trial.usage.evidence})"
        return ""

    @property
    def disturbed(self) -> bool:
        """Whether other programs kept its machine busy: its rates are not to be relied on."""
        return any(
            trial.usage is not None and trial.usage.bound == DISTURBED for trial in self.good()
        )

    def work(self) -> tuple[str, float] | None:
        """A unit of the work and its rate per second: that of the outermost loop, or the whole
        run if none was counted."""
        loops = [loop for loop in self.loops() if loop.rate > 0]
        if loops:
            return loops[0].unit, loops[0].rate
        compute = self.seconds("compute")
        return ("run", 1 / compute.value) if compute is not None and compute.value > 0 else None

    def door_to_door(self) -> tuple[float, float] | None:
        """Seconds for nothing, and for each unit of work: the model behind the break-even."""
        work, first = self.work(), self.first_result
        if work is None or first is None:
            return None
        loops = [loop for loop in self.loops() if loop.rate > 0]
        units_done = loops[0].done if loops else 1.0
        return max(0.0, first.value - units_done / work[1]), 1 / work[1]


@dataclass
class Comparison:
    """The targets of a comparison; the others are measured against the first one."""

    targets: list[TargetResult]
    repeat: int = 1
    kept: list[str] = field(default_factory=list)

    def __getitem__(self, target: str) -> TargetResult:
        for it in self.targets:
            if it.target == target:
                return it
        raise KeyError(target)

    @property
    def reference(self) -> TargetResult:
        """The first target."""
        return self.targets[0]

    def speed_up(self, target: TargetResult) -> Figure | None:
        """How many times faster than on the first target the work itself was."""
        one, other = self.reference.work(), target.work()
        if one is None or other is None or one[0] != other[0] or target is self.reference:
            return None
        return Figure(other[1] / one[1], "x", "measured", f"{one[0]}/s of both")

    def break_even(self, target: TargetResult) -> Figure | None:
        """From how many units of work on the target is quicker from door to door than the first
        one; 0 if it always is, None if it never is or that is not known. Estimated from the
        measured rates and times."""
        one, other = self.reference.door_to_door(), target.door_to_door()
        work = target.work()
        if one is None or other is None or work is None or target is self.reference:
            return None
        if one[1] < CLEAR * other[1] or self.reference.disturbed or target.disturbed:
            return None
        needed = max(0.0, (other[0] - one[0]) / (one[1] - other[1]))
        return Figure(needed, work[0], "estimated", "measured rates and times")

    def rows(self) -> list[dict[str, Any]]:
        """One row for each target and figure, for tables."""
        return [
            {
                "target": target.target,
                "gpu": target.gpu,
                "figure": name,
                "value": figure.value,
                "unit": figure.unit,
                "spread": figure.spread,
                "kind": figure.kind,
                "source": figure.source,
            }
            for target in self.targets
            for name, figure in self.all_figures(target).items()
        ]

    def all_figures(self, target: TargetResult) -> dict[str, Figure]:
        """Those of the target, and those that need the first one."""
        found = target.figures()
        for name, figure in (
            ("speed_up", self.speed_up(target)),
            ("break_even", self.break_even(target)),
        ):
            if figure is not None:
                found[name] = figure
        return found

    def to_frame(self) -> Any:
        """As a ``pandas.DataFrame``."""
        import pandas

        return pandas.DataFrame(self.rows())

    def to_csv(self) -> str:
        """As CSV."""
        rows, text = self.rows(), io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]) if rows else ["target"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_json(self) -> str:
        """As JSON: the rows, differences and notes."""
        return json.dumps(
            {
                "version": 1,
                "reference": self.reference.target,
                "repeat": self.repeat,
                "warm_up": WARM_UP_RULE,
                "figures": self.rows(),
                "targets": {
                    it.target: {
                        "error": it.error,
                        "bound": it.bound,
                        "agrees": self.agreement(it),
                        "differences": it.differences,
                        "notes": it.notes,
                        "usage": [msgspec.to_builtins(t.usage) for t in it.trials],
                    }
                    for it in self.targets
                },
            },
            indent=1,
        )

    def agreement(self, target: TargetResult) -> str:
        """Whether its results are those of the first target, in words."""
        if target is self.reference or not target.done:
            return ""
        if not target.compared:
            return "nothing to compare"
        if target.differences:
            return f"{len(target.differences)} differences"
        return f"the same ({target.compared} compared)"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and lines of what is shown: a line for each figure, a column for each target."""
        figures = [self.all_figures(target) for target in self.targets]
        names = list(dict.fromkeys(name for found in figures for name in found))
        names.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
        lines = []
        for name in names:
            cells = [str(found[name]) if name in found else "" for found in figures]
            if name == "break_even":
                cells = ["at once" if cell.startswith("~0 ") else cell for cell in cells]
            lines.append([_words(name), *cells])
        if any(target.bound for target in self.targets):
            lines.append(["bound by", *(target.bound for target in self.targets)])
        if len(self.targets) > 1:
            lines.append(["results", *(self.agreement(target) for target in self.targets)])
        return ["", *(target.name for target in self.targets)], lines

    def sentences(self) -> Iterator[str]:
        """What it means, in words."""
        for target in self.targets:
            if target.error:
                yield f"{target.name}: {target.error}"
            even = self.break_even(target)
            if even is not None:
                unit = even.unit if even.value == 1 else f"{even.unit}s"
                if even.value <= 0:
                    yield f"{target.name} is quicker from door to door at any amount of work."
                else:
                    yield (
                        f"From about {_ceil(even.value)} {unit} on, {target.name} is quicker from"
                        f" door to door than {self.reference.name} (estimated)."
                    )
            elif self._can_be_judged(target):
                yield self._no_gain(target)
            if target.disturbed:
                yield f"{target.name} was measured while other programs kept it busy."
            yield from (f"{target.name} differs at {place}" for place in target.differences)
            yield from (f"{target.name}: {note}" for note in target.notes)

    def _can_be_judged(self, target: TargetResult) -> bool:
        both = (target, self.reference)
        return target is not self.reference and all(it.done and not it.disturbed for it in both)

    def _no_gain(self, target: TargetResult) -> str:
        gain = self.speed_up(target)
        if gain is not None and gain.value >= 1 / CLEAR:
            return f"{target.name} was about as fast at the work itself as {self.reference.name}."
        return f"{target.name} was not faster at the work itself than {self.reference.name}."

    def _repr_html_(self) -> str:
        from mlinfra_sdk.comparison.chart import render

        return render(self)

    def __str__(self) -> str:
        header, lines = self.table()
        return "\n".join([*_aligned([header, *lines]), "", *self.sentences(), WARM_UP_RULE])


_FIRST = ("first_result", *PHASES)


def _words(figure: str) -> str:
    return _WORDS.get(figure, figure.replace("rate:", "rate of ").replace("_", " "))


_WORDS = {
    "first_result": "first result after",
    "memory_peak": "memory, peak",
    "cores": "processor",
    "gpu_busy": "GPU busy",
    "gpu_memory_peak": "GPU memory, peak",
    "gpu_energy": "GPU energy",
    "speed_up": "speed-up",
    "break_even": "quicker from",
}


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _ceil(value: float) -> str:
    whole = int(value) + (value > int(value))
    return f"{whole:,}"
