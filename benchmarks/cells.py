"""What a remote cell adds to a local one: `python -m benchmarks cells`.

All kinds of cell run in one kernel, interleaved in random order: a plain one, ``%%remote``,
``%%remote quiet`` and ipyparallel's ``%%px`` on one engine of this machine.
"""

from __future__ import annotations

import random
import time

from benchmarks.harness import LOAD, START_PEER, STOP_PEER, Figure, Kernel, kernel, median, p95, say

ROUNDS = 150
WARM_UP = 15
LINES = 200_000
MAGICS = {"local": "", "%%remote": "%%remote\n", "quiet": "%%remote quiet\n", "%%px": "%%px\n"}
PRINT = f'for i in range({LINES}):\n    print("line", i, "of many lines of output")'
LIBRARIES = "import numpy, pandas, matplotlib.pyplot"
BOUND_MB = 64


def main() -> list[Figure]:
    """All figures of this module."""
    figures = start(rounds=3)
    with kernel() as it:
        it.run(LOAD)
        it.run(START_PEER)
        figures += warm(it, "warm no-op cell")
        figures += lines(it, rounds=5)
        for magic in MAGICS.values():
            it.run(magic + LIBRARIES)
        figures += warm(it, "the same with numpy, pandas and matplotlib loaded")
        it.run(STOP_PEER)
    return figures


def start(rounds: int) -> list[Figure]:
    """From the first cell of a fresh kernel to the first output from the machine."""
    codes = {
        "ours": f"{LOAD}\nget_ipython().run_cell_magic('remote', '', 'print(1)')",
        "ipyparallel": f"{START_PEER}\nget_ipython().run_cell_magic('px', '', 'print(1)')",
    }
    seconds: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(rounds):
        for name, code in codes.items():
            say(f"start to first output: {name}")
            with kernel() as it:
                ran = it.run(code)
                # ipyparallel tells on stderr that it starts: its output is there at the end.
                seconds[name].append(ran.first_output if name == "ours" else ran.seconds)
                if name != "ours":
                    it.run(STOP_PEER)
    ours, peer = median(seconds["ours"]), median(seconds["ipyparallel"])
    return [
        Figure(
            "start to first output, fresh session",
            ours,
            "s",
            {"ipyparallel, 1 engine": peer},
            "<= 2 s",
            ours <= 2,
            f"median of {rounds}, imports included",
        )
    ]


def warm(it: Kernel, what: str) -> list[Figure]:
    """Milliseconds of cells that do nothing."""
    say(what)
    taken: dict[str, list[float]] = {name: [] for name in MAGICS}
    order = list(MAGICS)
    shuffle = random.Random(1).shuffle
    for round_ in range(WARM_UP + ROUNDS):
        shuffle(order)
        for name in order:
            ran = it.run(MAGICS[name] + "pass")
            if round_ >= WARM_UP:
                taken[name].append(ran.seconds * 1e3)
            time.sleep(0.005)  # as between the cells of a user: what comes late is not the next's
    figures = []
    local = median(taken["local"])
    for name, title in (("%%remote", "adds"), ("quiet", "`quiet` adds")):
        adds = median(taken[name]) - local
        figures.append(
            Figure(
                f"{what}: {title}",
                adds,
                "ms",
                {"%%px adds": median(taken["%%px"]) - local},
                "<= 4 ms",
                adds <= 4,
                "median (95 %) in ms: "
                + ", ".join(f"{key} {median(t):.1f} ({p95(t):.1f})" for key, t in taken.items()),
            )
        )
    return figures


def lines(it: Kernel, rounds: int) -> list[Figure]:
    """Seconds for many printed lines, and how the memory of this kernel grows meanwhile."""
    taken: dict[str, list[float]] = {name: [] for name in MAGICS if name != "quiet"}
    growth: dict[str, list[float]] = {name: [] for name in taken}
    for round_ in range(rounds):
        say(f"{LINES} lines: round {round_ + 1}")
        for name in taken:
            before = it.memory()
            it.reset_peak()
            ran = it.run(MAGICS[name] + PRINT)
            if ran.characters < LINES * 30:
                raise RuntimeError(f"{name}: output is missing.")
            taken[name].append(ran.seconds)
            growth[name].append((it.peak_memory() - before) / 1e6)
    ratio = median(taken["%%remote"]) / median(taken["local"])
    most = max(growth["%%remote"])
    return [
        Figure(
            f"{LINES // 1000}k printed lines",
            median(taken["%%remote"]),
            "s",
            {"local": median(taken["local"]), "%%px": median(taken["%%px"])},
            "<= 1.1x local",
            ratio <= 1.1,
            f"median of {rounds}",
        ),
        Figure(
            f"{LINES // 1000}k printed lines: growth of the client's memory, worst",
            most,
            "MB",
            {"local": max(growth["local"]), "%%px": max(growth["%%px"])},
            f"bounded (<= {BOUND_MB} MB)",
            most <= BOUND_MB,
            "peak resident set of the notebook's kernel over the run",
        ),
    ]
