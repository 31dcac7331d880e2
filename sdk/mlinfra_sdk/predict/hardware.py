"""How much faster one machine may be than another, by their figures alone.

These are guesses with wide bounds, in the logarithm of the ratio of times: what a program makes of
a machine depends on the program. They count until something has run on both machines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlinfra_sdk.catalog import catalog

from .calibration import Calibration

_GAIN = 0.75


@dataclass(frozen=True)
class Used:
    """What a run has used of its machine; None where nobody looked: a quick one, say. ``busy``:
    share of the time in which its GPU worked."""

    cores: float | None = None
    cores_here: float | None = None
    busy: float | None = None
    memory_bound: bool = False


@dataclass(frozen=True)
class Guess:
    """Logarithm of the ratio of times, its standard deviation, and what it is made of."""

    mean: float
    deviation: float
    basis: str


def guess(
    used: Used, gpu: str, other: str, cores_there: float | None, here: Calibration | None
) -> Guess | None:
    """From a run that has used so much on a machine with ``gpu`` (empty: none) to a machine with
    ``other``. None if nothing can be said."""
    if not gpu and not other:
        return _processors(used, cores_there)
    if gpu and other:
        return _gpus(used, gpu, other)
    speed = _speed(gpu or other, here)
    if speed is None:
        return None
    # Most of what the figures promise, in the time in which it computes: 0.75 and 0.3 are between
    # trainings that gain nothing, and a CNN and a transformer block that gained 39 and 45 of 61 on
    # an H100 (benchmarks/results/2026-11-26-h100-gpu.md).
    busy = 1.0 if used.cores is None else min(1.0, used.cores)
    if gpu:
        busy = 1.0 if used.busy is None else used.busy
    gain = math.exp((-_GAIN if other else _GAIN) * math.log(speed))
    basis = "figures of processor and GPU alone, if it uses the GPU"
    return Guess(math.log(1 - busy + busy * gain), max(0.5, 0.3 * busy * math.log(speed)), basis)


def _processors(used: Used, there: float | None) -> Guess:
    basis = "another processor, which nothing is known of"
    cores, here = used.cores, used.cores_here
    if cores is None or here is None or there is None:
        return Guess(0.0, 0.5, basis)
    basis = f"{there:g} cores instead of {here:g}"
    if there < cores:
        return Guess(math.log(cores / there), 0.3, basis)
    if there > here and cores >= 0.85 * here:  # it may use more, if there are more
        more = math.log(there / here)
        return Guess(-0.5 * more, 0.25 + 0.3 * more, basis)
    return Guess(0.0, 0.35, basis)


def _gpus(used: Used, gpu: str, other: str) -> Guess | None:
    ratio = _ratio(gpu, other, used.memory_bound)
    if ratio is None:
        return None
    busy = 0.8 if used.busy is None else used.busy
    factor = busy / ratio + 1 - busy
    what = "bandwidth" if used.memory_bound else "arithmetic"
    return Guess(math.log(factor), 0.4, f"{what} of the GPUs by the catalog")


def _ratio(gpu: str, other: str, memory_bound: bool) -> float | None:
    """How much faster the other GPU is by the catalog."""
    known = catalog().parts
    ones = [known[part] for part in catalog().parts_of(gpu) if part in known]
    others = [known[part] for part in catalog().parts_of(other) if part in known]
    if not ones or not others:
        return None
    one, two = ones[0], others[0]
    if memory_bound:
        return two.bandwidth_gb_s / one.bandwidth_gb_s
    for kind in ("bf16", "fp16", "tf32", "fp32"):
        a, b = getattr(one.tflops, kind), getattr(two.tflops, kind)
        if a and b:
            return float(b / a)
    return two.bandwidth_gb_s / one.bandwidth_gb_s


def _speed(gpu: str, here: Calibration | None) -> float | None:
    """What a GPU promises beside this computer's processor: the lesser of arithmetic and
    bandwidth."""
    known = catalog().parts
    parts = [known[part] for part in catalog().parts_of(gpu) if part in known]
    if not parts or here is None:
        return None
    speeds = [parts[0].bandwidth_gb_s / here.bandwidth]
    if parts[0].tflops.fp32 and here.gflops:
        speeds.append(parts[0].tflops.fp32 * 1000 / here.gflops)
    return max(1.5, min(speeds))
