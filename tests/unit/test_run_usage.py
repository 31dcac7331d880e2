"""What readings add up to. The readings of GPUs are made up here, not recorded."""

from __future__ import annotations

import pytest

from mlinfra_sdk.meters import Meter
from mlinfra_sdk.worker.run_usage import GpuReading, Reading, Sums


def reading(cores: float = 1.0, *, others: float = 0.0, **gpu: float) -> Reading:
    gpus = [GpuReading("A10", total=24 << 30, used=4 << 30, **gpu)] if gpu else []
    return Reading(0.0, 1.0, cores, 1000, others, gpus=gpus)


def meter(key: int, done: float, seconds: float, **more: object) -> Meter:
    return Meter(key, "train", "it", done, 100, seconds, "tqdm", **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "cores, others, gpu, bound",
    [
        (4.0, 0.0, None, "processor"),
        (1.0, 0.0, None, "one thread"),
        (2.4, 0.0, None, "few threads"),
        (0.1, 0.0, None, "waiting (the processor is hardly busy)"),
        (0.9, 3.0, None, "other programs of the machine"),
        (1.0, 0.0, (95, 20), "GPU"),
        (1.0, 0.0, (95, 85), "GPU memory"),
        (3.9, 0.0, (30, 10), "input (the processor feeds the GPU too slowly)"),
        (1.1, 0.0, (30, 10), "input (few processes feed the GPU)"),
        (0.2, 0.0, (10, 1), "waiting (neither GPU nor processor is busy)"),
        (1.0, 0.0, (70, 10), "GPU and input alike"),
    ],
)
def test_what_bounds_a_run_is_said_with_figures(
    cores: float, others: float, gpu: tuple[float, float] | None, bound: str
) -> None:
    sums = Sums(cores_here=4)
    more = dict(zip(("busy", "memory_busy"), gpu, strict=True)) if gpu else {}
    sums.add(reading(cores, others=others, **more))
    usage = sums.usage
    assert usage.bound == bound
    assert (f"{gpu[0]} %" if gpu else f"{cores:.1f} of 4 cores") in usage.evidence


def test_means_peaks_and_energy() -> None:
    sums = Sums(cores_here=2)
    sums.add(reading(0.5, busy=50.0, watts=100.0))
    sums.add(reading(1.5, busy=100.0, watts=200.0))
    sums.add(reading(1.0))  # the driver told nothing for a second
    usage = sums.usage
    assert usage.cores == 1.0 and usage.cores_peak == 1.5 and usage.memory_peak == 1000
    assert usage.gpu_busy == 75.0 and usage.joules == 300.0 and usage.gpu_memory_peak == 4 << 30
    assert usage.gpu_memory_busy is None


def test_the_rate_leaves_the_warm_up_out() -> None:
    """A tenth of the time, in which the loop was slow; then 10 a second, give or take one."""
    sums = Sums(cores_here=1)
    done = [1, 2, 12, 21, 32, 42, 52, 62, 72, 82, 92]
    for seconds, count in enumerate(done, start=1):
        sums.count([meter(1, count, seconds)])
    (loop,) = sums.usage.loops
    assert loop.warm_up == 2 and loop.rate == 10.0
    assert loop.spread == pytest.approx(0.5, abs=0.1)
    assert loop.done == 92 and loop.seconds == 11


def test_loops_of_one_kind_are_added_up() -> None:
    """Batches of epoch after epoch; those that have ended come again until they are forgotten."""
    sums = Sums(cores_here=1)
    sums.count([meter(1, 100, 4.0, ended=True, nested=True)])
    sums.count([meter(1, 100, 4.0, ended=True, nested=True), meter(2, 50, 2.0, nested=True)])
    sums.count([meter(2, 100, 4.0, ended=True, nested=True)])
    (loop,) = sums.usage.loops
    assert (loop.done, loop.total, loop.seconds, loop.rate) == (200, 200, 8.0, 25.0)
    assert loop.nested and loop.spread is None


def test_a_loop_that_was_seen_once() -> None:
    sums = Sums(cores_here=1)
    sums.count([meter(1, 30, 1.5, ended=True)])
    usage = sums.usage
    assert usage.loops[0].rate == 20.0 and usage.readings == 0 and usage.bound == ""


def test_many_readings_take_bounded_room() -> None:
    sums = Sums(cores_here=1)
    for second in range(1, 5001):
        sums.count([meter(1, second * 7, second)])
    (kind,) = sums._loops.values()
    assert len(kind._points) <= 600
    assert sums.usage.loops[0].rate == pytest.approx(7.0)
