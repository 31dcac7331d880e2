"""What a run card tells."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from mlinfra_sdk import units
from mlinfra_sdk.meters import Meter
from mlinfra_sdk.worker.run_usage import Reading, RunUsage

Phase = Literal[
    "quote",
    "confirm",
    "start",
    "environment",
    "data",
    "running",
    "reconnecting",
    "detached",
    "done",
    "error",
    "interrupted",
    "lost",
]
ENDED: frozenset[Phase] = frozenset({"done", "error", "interrupted", "lost"})


_READINGS = 90
"""Seconds of the card's curves."""


@dataclass
class RunState:
    """The facts of one run, filled in as it goes on.

    :meth:`enter` keeps the clock. Money is micro-USD, ``rate`` per hour. ``sent`` and ``received``
    are the names of variables that moved, ``warnings`` and ``note`` full sentences.
    """

    phase: Phase = "start"
    target: str = "local"
    machine: str = ""
    run: str = ""
    """What ``%remote attach`` calls it."""
    background: bool = False
    """Whether other cells can run while it goes on."""
    notify: bool = False
    """Whether its end is worth a notification: nobody may be looking at the cell."""
    gpu: str = ""
    rate: int | None = 0
    """None: nobody states a price."""
    bytes_up: int = 0
    bytes_down: int = 0
    detail: str = ""
    """What the present phase is at."""
    progress: tuple[int, int] | None = None
    """Bytes done and in all of the present phase, where that is known."""
    safe: tuple[str, int, float] | None = None
    """The last checkpoint that outlives the machine: name, step, Unix time."""
    sent: list[str] = field(default_factory=list)
    received: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    note: str = ""
    stops: float | None = None
    """When the machine is going to stop if nothing more runs on it (Unix time)."""
    ending: bool = False
    """Whether that is near, and nobody may be looking at the cell."""
    readings: list[Reading] = field(default_factory=list)
    """What its machine did in the last seconds."""
    usage: RunUsage | None = None
    """What it has used, once it has ended."""
    cost: int | None = None
    """What it cost by the ledger; until that is known, time at ``rate``."""
    seconds: dict[Phase, float] = field(default_factory=dict)
    """Time spent in the phases that are over, in their order."""
    entered: float = field(default_factory=time.monotonic)
    """When the present phase began, on the monotonic clock."""

    def enter(self, phase: Phase) -> None:
        """Go on to another phase now."""
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.entered
        self.phase = phase
        self.progress = None
        self.detail = ""
        self.entered = now

    def heard(self, reading: Reading) -> None:
        """Another second of it."""
        self.readings.append(reading)
        del self.readings[:-_READINGS]

    def speed(self) -> tuple[Meter, float] | None:
        """The innermost loop that is under way, and its units per second in the last reading."""
        if not self.readings:
            return None
        under_way = [meter for meter in self.readings[-1].meters if not meter.ended]
        if not under_way:
            return None
        meter = under_way[-1]
        before = [
            it
            for reading in self.readings[-6:-1]
            for it in reading.meters
            if it.key == meter.key and it.seconds < meter.seconds
        ]
        done, seconds = (before[0].done, before[0].seconds) if before else (0.0, 0.0)
        passed = meter.seconds - seconds
        return (meter, (meter.done - done) / passed) if passed > 0 else None

    def phases(self) -> dict[Phase, float]:
        """Seconds of each phase until now, the present one included."""
        if self.phase in ENDED:
            return self.seconds
        spent = self.seconds.get(self.phase, 0.0) + self.present()
        return self.seconds | {self.phase: spent}

    def present(self) -> float:
        """Seconds in the present phase until now."""
        return time.monotonic() - self.entered

    def spent(self, elapsed: float) -> int | None:
        """Micro-USD so far; None if no price is known."""
        if self.cost is not None or self.rate is None:
            return self.cost
        return units.cost(self.rate, elapsed)

    def facts(self) -> dict[str, Any]:
        """The same as JSON, for front ends that draw the card themselves."""
        phases = self.phases()
        elapsed = sum(phases.values())
        return {
            "version": 1,
            "phase": self.phase,
            "detail": self.detail,
            "target": self.target,
            "machine": self.machine,
            "run": self.run,
            "background": self.background,
            "notify": self.notify and self.phase in ENDED,
            "gpu": self.gpu,
            "elapsed": round(elapsed, 6),
            "seconds": {phase: round(seconds, 6) for phase, seconds in phases.items()},
            "rate_micro_usd_per_hour": self.rate,
            "cost_micro_usd": self.spent(elapsed),
            "progress": list(self.progress) if self.progress else None,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "safe": list(self.safe) if self.safe else None,
            "sent": list(self.sent),
            "received": list(self.received),
            "stops": self.stops,
            "ending": self.ending,
            "warnings": list(self.warnings),
            "note": self.note,
            "usage": msgspec.to_builtins(self.usage) if self.usage else None,
        }
