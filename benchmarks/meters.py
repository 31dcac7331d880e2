"""What it costs to measure a run: `python -m benchmarks meters`.

Interleaved: a loop that sorts in one thread, some milliseconds a step, plain, in a bar of tqdm, and
under ``track``, in a remote cell, whose loops and resources are read each second; beside the same
code in a plain IPython kernel, which nobody measures. It is processor time of the loop's own
thread, since times by the clock differ by 2 to 3 % from round to round. What the agent's process
takes meanwhile is told apart. And a round of LightGBM and of XGBoost with their calls patched,
beside the same process without, by the clock.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.harness import LOAD, Figure, Kernel, kernel, median, say

ROUNDS = 7
STEPS = 600
"""Some seconds: what is over in two is not looked at."""

PREPARE = """
import time, numpy as np
from tqdm import tqdm
from mlinfra_sdk import track
a = np.random.default_rng(0).random(1_100_000)
def work(steps):
    began = time.thread_time()
    for step in steps:
        b = np.sort(a)
    return time.thread_time() - began
"""
LOOPS = {
    "plain": f"taken = work(range({STEPS}))",
    "tqdm": f"taken = work(tqdm(range({STEPS})))",
    "track": f"taken = work(track(range({STEPS}), samples=32))",
}
LIBRARIES = {
    "LightGBM, a round": """
import lightgbm
x = np.random.default_rng(0).random((2000, 20))
data = lightgbm.Dataset(x, x[:, 0])
booster = lightgbm.Booster({"verbose": -1, "num_threads": 1}, data)
def steps():
    for _ in range(150): booster.update()
    return 150
""",
    "XGBoost, a round": """
import xgboost
x = np.random.default_rng(0).random((2000, 20))
data = xgboost.DMatrix(x, x[:, 0])
def steps():
    xgboost.train({"nthread": 1}, data, 100)
    return 100
""",
}
CHILD = """
import json, sys, time
import numpy as np
if {watched}:
    from mlinfra_sdk.meters import meters, watch
    watch()
{code}
steps()
found = []
for _ in range(9):
    began = time.perf_counter()
    count = steps()
    found.append((time.perf_counter() - began) / count)
print(json.dumps(sorted(found)[4]))
"""


def main() -> list[Figure]:
    """All figures."""
    return [*loops(), *libraries()]


def loops() -> list[Figure]:
    """A loop in a remote cell beside one that nobody looks at."""
    times: dict[tuple[str, str], list[float]] = {}
    agents: list[float] = []
    with kernel() as ours, kernel() as plain:
        ours.run(LOAD)
        ours.run("%%remote\n" + PREPARE)
        plain.run(PREPARE)
        for number in range(ROUNDS):
            for name, code in LOOPS.items():
                order = [("measured", ours), ("plain", plain)]
                for who, it in order if number % 2 else order[::-1]:
                    cell = f"%%remote\n{code}" if it is ours else code
                    began, worked = time.perf_counter(), _agent_seconds(it.home)
                    it.run(cell)
                    if it is ours:
                        worked = _agent_seconds(it.home) - worked
                        agents.append(100 * worked / (time.perf_counter() - began))
                    times.setdefault((name, who), []).append(_taken(it))
            say(str({key: round(found[-1], 3) for key, found in times.items()}))
    figures = [
        Figure(
            "the agent's processor time during runs",
            median(agents),
            "% of a core",
            note="also what it takes to begin and end them",
        )
    ]
    for name in LOOPS:
        measured, peer = (median(times[name, who]) for who in ("measured", "plain"))
        spread = statistics.stdev(times[name, "plain"]) / peer
        figures.append(
            Figure(
                f"a loop of {STEPS} steps, {name}",
                measured,
                "s",
                {"not measured": peer},
                "<= 1.01",
                measured <= 1.01 * peer,
                f"median of {ROUNDS}; the peer's rounds differ by {100 * spread:.1f} %",
            )
        )
    return figures


def _agent_seconds(home: Path) -> float:
    """Processor time of the agents below a state directory."""
    total = 0.0
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if "mlinfra_sdk.worker" in words and any(str(home) in word for word in words):
                times = process.cpu_times()
                total += times.user + times.system
    return total


def _taken(it: Kernel) -> float:
    """What the loop took, by its own word."""
    path = it.home / "taken"
    it.run(f"open({str(path)!r}, 'w').write(str(taken))")
    return float(path.read_text())


def libraries() -> list[Figure]:
    """A step of a library with and without its patch."""
    figures = []
    for name, code in LIBRARIES.items():
        found: dict[bool, list[float]] = {True: [], False: []}
        for number in range(ROUNDS):
            for watched in (True, False) if number % 2 else (False, True):
                child = CHILD.format(watched=watched, code=code)
                said = subprocess.check_output([sys.executable, "-c", child], text=True)
                found[watched].append(1000 * float(json.loads(said)))
        ours, peer = median(found[True]), median(found[False])
        figures.append(
            Figure(
                name,
                ours,
                "ms",
                {"not counted": peer},
                "<= 1.01",
                ours <= 1.01 * peer,
                f"median of {ROUNDS} processes",
            )
        )
    return figures
