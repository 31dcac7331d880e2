"""What a run does and has used, and how fast its loops were: readings and their sum."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise

import msgspec

from mlinfra_sdk.meters import Meter

WARM_UP = 0.1
"""Share of a loop's time that is left out of its rate, at least one reading: compilers, caches,
clocks and workers that are still starting."""
_POINTS = 600
"""Readings of a loop that are kept; of a longer run every second, fourth ... one."""
_GPU_BUSY, _GPU_WAITS, _MEMORY_BUSY = 80.0, 60.0, 70.0
_CORES_BUSY = 0.85
_ONE_CORE = 0.8
DISTURBED = "other programs of the machine"


class GpuReading(msgspec.Struct, omit_defaults=True):
    """One GPU. ``busy`` and ``memory_busy``: percent of the time in which its cores, and its
    memory's interface, did something; ``used`` and ``total`` bytes; ``watts``, ``celsius``. What
    the driver does not tell is None."""

    name: str
    busy: float | None = None
    memory_busy: float | None = None
    used: int = 0
    total: int = 0
    watts: float | None = None
    celsius: float | None = None


class Reading(msgspec.Struct, omit_defaults=True):
    """One second of a run. ``cores``: processor cores that its kernel and all processes below it
    kept busy, ``others`` what all other programs of the machine did; ``memory`` their resident
    bytes. Rates in bytes per second are the machine's."""

    at: float
    seconds: float
    cores: float
    memory: int
    others: float = 0.0
    read: float = 0.0
    written: float = 0.0
    received: float = 0.0
    sent: float = 0.0
    gpus: list[GpuReading] = []
    meters: list[Meter] = []


class Loop(msgspec.Struct, omit_defaults=True):
    """The loops of one kind of a run (all its epochs, all its batches). ``rate``: units per second
    after the warm-up of so many seconds; ``spread``: standard deviation of the rates of the
    readings, None with less than three; ``source`` says who counted."""

    label: str
    unit: str
    done: float
    total: float
    seconds: float
    rate: float
    source: str
    spread: float | None = None
    warm_up: float = 0.0
    nested: bool = False


class RunUsage(msgspec.Struct, omit_defaults=True):
    """Of a whole run. Means are over its time; bytes; ``joules`` of its GPUs, by the power that
    their driver told. ``bound`` is what it waited for, in words, ``evidence`` what says so."""

    seconds: float
    readings: int
    cores: float
    cores_peak: float
    cores_here: int
    memory_peak: int
    others: float = 0.0
    gpu: str = ""
    gpu_busy: float | None = None
    gpu_memory_busy: float | None = None
    gpu_memory_peak: int = 0
    gpu_memory: int = 0
    joules: float | None = None
    read: float = 0.0
    written: float = 0.0
    received: float = 0.0
    sent: float = 0.0
    loops: list[Loop] = []
    bound: str = ""
    evidence: str = ""


class Sums:
    """Adds readings up, in bounded memory."""

    def __init__(self, cores_here: int) -> None:
        self._cores_here = cores_here
        self._count = 0
        self._seconds = 0.0
        self._peak = {"cores": 0.0, "memory": 0, "gpu_memory": 0}
        self._mean: dict[str, float] = {}
        self._told: dict[str, float] = {}
        """Seconds for which a figure that may be missing was told."""
        self._gpus: list[GpuReading] = []
        self._loops: dict[tuple[str, str, bool], _Kind] = {}

    def add(self, reading: Reading) -> None:
        """Take one more second."""
        seconds = reading.seconds
        self._count += 1
        self._seconds += seconds
        peak = self._peak
        peak["cores"] = max(peak["cores"], reading.cores)
        peak["memory"] = max(peak["memory"], reading.memory)
        for name in ("cores", "others", "read", "written", "received", "sent"):
            self._add(name, getattr(reading, name), seconds)
        if reading.gpus:
            self._gpus = reading.gpus
            used = sum(gpu.used for gpu in reading.gpus)
            peak["gpu_memory"] = max(peak["gpu_memory"], used)
            for name in ("busy", "memory_busy"):
                told = [value for gpu in reading.gpus if (value := getattr(gpu, name)) is not None]
                if told:
                    self._add(name, sum(told) / len(told), seconds)
            watts = [gpu.watts for gpu in reading.gpus if gpu.watts is not None]
            if watts:
                self._add("watts", sum(watts), seconds)
        self.count(reading.meters)

    def count(self, meters: Sequence[Meter]) -> None:
        """Take what the loops have counted."""
        groups: dict[tuple[str, str, bool], list[Meter]] = {}
        for meter in meters:
            groups.setdefault((meter.source, meter.unit, meter.nested), []).append(meter)
        for kind, found in groups.items():
            self._loops.setdefault(kind, _Kind()).add(found)

    def _add(self, name: str, value: float, seconds: float) -> None:
        self._mean[name] = self._mean.get(name, 0.0) + value * seconds
        self._told[name] = self._told.get(name, 0.0) + seconds

    def _average(self, name: str) -> float | None:
        told = self._told.get(name, 0.0)
        return self._mean[name] / told if told else None

    @property
    def usage(self) -> RunUsage:
        """The sum so far."""
        gpus = self._gpus
        usage = RunUsage(
            round(self._seconds, 3),
            self._count,
            self._average("cores") or 0.0,
            self._peak["cores"],
            self._cores_here,
            int(self._peak["memory"]),
            self._average("others") or 0.0,
            gpus[0].name if gpus else "",
            self._average("busy"),
            self._average("memory_busy"),
            int(self._peak["gpu_memory"]),
            sum(gpu.total for gpu in gpus),
            self._mean.get("watts"),
            loops=[kind.loop(*key) for key, kind in self._loops.items()],
        )
        for name in ("read", "written", "received", "sent"):
            setattr(usage, name, self._mean.get(name, 0.0))
        if self._count:
            usage.bound, usage.evidence = _bound(usage)
        return usage


class _Kind:
    """All loops of a run that count the same thing: epoch after epoch."""

    def __init__(self) -> None:
        self._over = (0.0, 0.0, 0.0)
        """(done, total, seconds) of those that have ended."""
        self._ended: set[int] = set()
        self._points: list[tuple[float, float]] = [(0.0, 0.0)]
        self._every = 1
        self._seen = 0
        self._label = ""
        self._now = self._over

    def add(self, meters: Sequence[Meter]) -> None:
        now = self._over
        for meter in meters:
            if meter.key in self._ended:
                continue
            self._label = meter.label or self._label
            state = (now[0] + meter.done, now[1] + meter.total, now[2] + meter.seconds)
            if meter.ended:
                self._ended.add(meter.key)
                done, total, seconds = self._over
                self._over = (done + meter.done, total + meter.total, seconds + meter.seconds)
            now = state
        self._now = now
        self._seen += 1
        if now[2] > self._points[-1][0] and self._seen % self._every == 0:
            self._points.append((now[2], now[0]))
            if len(self._points) > _POINTS:
                self._points = self._points[::2]
                self._every *= 2

    def loop(self, source: str, unit: str, nested: bool) -> Loop:
        done, total, seconds = self._now
        points = self._points
        if points[-1] != (seconds, done) and seconds > points[-1][0]:
            points = [*points, (seconds, done)]
        # A slow loop's count stands still in most readings: only those in which it moved tell.
        moved = [after for before, after in pairwise(points) if after[1] > before[1]]
        steady = [point for point in moved if point[0] >= WARM_UP * seconds]
        if len(steady) < 2:
            rate = done / seconds if seconds else 0.0
            return Loop(self._label, unit, done, total, seconds, rate, source, nested=nested)
        (began, before), (ended, after) = steady[0], steady[-1]
        rates = [(there - here) / (then - at) for (at, here), (then, there) in pairwise(steady)]
        spread = statistics.stdev(rates) if len(rates) > 2 else None
        rate = (after - before) / (ended - began)
        return Loop(self._label, unit, done, total, seconds, rate, source, spread, began, nested)


def _bound(usage: RunUsage) -> tuple[str, str]:
    """What a run waited for most, and the figures that say so. The thresholds are rules of thumb;
    the figures are shown beside, so that everybody can judge."""
    cores = f"{usage.cores:.1f} of {usage.cores_here} cores busy"
    if usage.gpu_busy is not None:
        busy = f"GPU busy {usage.gpu_busy:.0f} % of the time"
        if usage.gpu_busy >= _GPU_BUSY:
            memory = usage.gpu_memory_busy
            if memory is not None and memory >= _MEMORY_BUSY:
                return "GPU memory", f"{busy}, its memory {memory:.0f} %"
            return "GPU", busy
        if usage.gpu_busy < _GPU_WAITS and not _crowded(usage):
            if usage.cores >= _CORES_BUSY * usage.cores_here:
                return "input (the processor feeds the GPU too slowly)", f"{busy}, {cores}"
            if usage.cores >= _ONE_CORE:
                return "input (few processes feed the GPU)", f"{busy}, {cores}"
            return "waiting (neither GPU nor processor is busy)", f"{busy}, {cores}"
        if usage.gpu_busy >= _GPU_WAITS:
            return "GPU and input alike", f"{busy}, {cores}"
    if _crowded(usage):
        return DISTURBED, f"{cores}, {usage.others:.1f} by others"
    if usage.cores >= _CORES_BUSY * usage.cores_here:
        return "processor", cores
    if usage.cores >= _ONE_CORE:
        return "one thread" if usage.cores < 1.5 else "few threads", cores
    return "waiting (the processor is hardly busy)", cores


def _crowded(usage: RunUsage) -> bool:
    """Whether the processors were busy, mostly for others."""
    busy = usage.cores + usage.others
    return usage.others > usage.cores and busy >= _CORES_BUSY * usage.cores_here
