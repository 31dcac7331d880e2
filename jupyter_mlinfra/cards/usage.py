"""The part of a run card about how the machine is used: words and small curves."""

from __future__ import annotations

from collections.abc import Sequence

from mlinfra_sdk.units import format_duration, format_size
from mlinfra_sdk.worker.run_usage import Loop, RunUsage

from .state import RunState

_WIDTH, _HEIGHT = 72, 14


def live_facts(state: RunState) -> list[str]:
    """Of a run that is under way: its loop, its rate, how busy the machine is."""
    facts = []
    speed = state.speed()
    if speed is not None:
        meter, rate = speed
        facts.append(f"{meter} · {_number(rate)} {meter.unit}/s")
    if state.readings:
        reading = state.readings[-1]
        busy = [gpu.busy for gpu in reading.gpus if gpu.busy is not None]
        if busy:
            facts.append(f"GPU {sum(busy) / len(busy):.0f} %")
            used = sum(gpu.used for gpu in reading.gpus)
            facts.append(f"{format_size(used)} VRAM")
        else:
            facts.append(f"{reading.cores:.1f} cores")
            facts.append(f"{format_size(reading.memory)} RAM")
    return facts


def curves(state: RunState) -> str:
    """The last seconds of GPU or processor as a curve."""
    readings = state.readings
    if len(readings) < 2:
        return ""
    if any(reading.gpus for reading in readings):
        label, top = "GPU", 100.0
        values = [
            sum(gpu.busy or 0.0 for gpu in reading.gpus) / max(1, len(reading.gpus))
            for reading in readings
        ]
    else:
        label = "processor"
        values = [reading.cores for reading in readings]
        top = max(1.0, *values)
    return (
        f' <svg role="img" aria-label="{label} in the last {len(values)} seconds"'
        f' width="{_WIDTH}" height="{_HEIGHT}" style="vertical-align:-2px">'
        f'<polyline points="{_points(values, top)}" fill="none" stroke="#3b82f6"'
        ' stroke-width="1.5"/></svg>'
    )


def _points(values: Sequence[float], top: float) -> str:
    step = _WIDTH / max(1, len(values) - 1)
    return " ".join(
        f"{i * step:.0f},{_HEIGHT - 1 - (_HEIGHT - 2) * min(value, top) / top:.1f}"
        for i, value in enumerate(values)
    )


def usage_rows(usage: RunUsage) -> list[tuple[str, str]]:
    """What a run has used: (label, words)."""
    rows = []
    for loop in usage.loops:
        rows.append(("Speed", _speed(loop)))
    if not usage.readings:
        return rows
    words = [
        f"{usage.cores:.1f} of {usage.cores_here} cores (peak {usage.cores_peak:.1f})",
        f"{format_size(usage.memory_peak)} memory at most",
    ]
    if usage.gpu:
        gpu = usage.gpu
        if usage.gpu_busy is not None:
            gpu += f" busy {usage.gpu_busy:.0f} % of the time"
        words.append(gpu)
        words.append(f"{format_size(usage.gpu_memory_peak)} of {format_size(usage.gpu_memory)}")
        if usage.joules is not None:
            words.append(f"{usage.joules / 3600:.2g} Wh")
    rows.append(("Used", ", ".join(words)))
    rows.append(("Bound by", f"{usage.bound}: {usage.evidence}"))
    return rows


def _speed(loop: Loop) -> str:
    spread = f" ± {_number(loop.spread)}" if loop.spread is not None else ""
    label = f"{loop.label}: " if loop.label else ""
    left = f", the first {format_duration(loop.warm_up)} left out" if loop.warm_up else ""
    return (
        f"{label}{_number(loop.rate)}{spread} {loop.unit}/s"
        f" ({loop.done:g} {loop.unit} in {format_duration(loop.seconds)}{left})"
    )


def _number(value: float) -> str:
    """Three digits, never in powers of ten."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
