"""What it costs that nothing is lost: `python -m benchmarks runs`.

The journal's part of a run with many lines, how long outputs stay away after a cut, and how long
it takes to attach to a run that has printed 100 MB. The paths that are cut, and the machine behind
them, are those of the fault tests (tests/integration/chaos.py and faulty.py).
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import LOAD, Figure, kernel, median, say

ROUNDS = 7
LINES = 200_000
PRINT = f'for i in range({LINES}):\n    print("line", i, "of many lines of output")'
UNJOURNALED = Path(__file__).parent / "unjournaled"
CUTS = 15
AWAY = 2.0
"""Seconds for which a path is down."""
ATTACHED_LINES = 100_000
LONG = f'text = "x" * 990\nfor i in range({ATTACHED_LINES}):\n    print(f"{{i:08}}", text)'


def main() -> list[Figure]:
    """All figures of this module."""
    return [*overhead(), *resume(), attach()]


def overhead() -> list[Figure]:
    """The same run with journals on disk and in memory, in turns."""
    taken: dict[str, list[float]] = {"journal": [], "memory": []}
    with kernel() as journaled, _with_path(UNJOURNALED), kernel() as unjournaled:
        kernels = {"journal": journaled, "memory": unjournaled}
        for it in kernels.values():
            it.run(LOAD)
            it.run("%%remote quiet\npass")
        for round_ in range(ROUNDS):
            say(f"journal: round {round_ + 1}")
            for name, it in kernels.items():
                taken[name].append(it.run("%%remote quiet\n" + PRINT).seconds)
    ours, without = median(taken["journal"]), median(taken["memory"])
    share = 100 * (ours / without - 1)
    return [
        Figure(
            f"journal's share of {LINES // 1000}k printed lines",
            share,
            "%",
            {},
            "<= 5 %",
            share <= 5,
            f"median of {ROUNDS}: {ours:.3f} s, {without:.3f} s with messages only in memory",
        )
    ]


def resume() -> list[Figure]:
    """How long outputs of a cell that prints all the time stay away."""
    from chaos import net
    from faulty import Client, Recorder

    from mlinfra_sdk.spec import Request

    class Clock(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def publish(self, record: Any) -> None:
            self.times.append(time.perf_counter())

    found: dict[str, list[float]] = {"at once": [], "later": []}
    with _home() as home, net(home / "net") as path:
        it = Client(Request(on="chaos", isolate=True))
        it.run("1")
        clock = Clock()
        code = (
            "import time, pathlib\nwhile not pathlib.Path('end').exists():\n"
            "    print('x', flush=True)\n    time.sleep(0.005)"
        )
        thread = threading.Thread(target=lambda: it.run(code, clock))
        thread.start()
        try:
            for number in range(CUTS):
                say(f"cut {number + 1} of {CUTS}")
                _await_outputs(clock.times, 20)
                cut = time.perf_counter()
                path.cut()
                _await_outputs(clock.times, 100)
                found["at once"].append(_longest_silence(clock.times, cut))
                path.down()
                time.sleep(AWAY)
                back = time.perf_counter()
                path.up()
                _await_outputs(clock.times, 20)
                found["later"].append(next(at for at in clock.times if at > back) - back)
        finally:
            folder = Path(it.session.machine.handle.data["folder"])
            (folder / "work" / "end").touch()
            thread.join()
            it.session.stop()
    return [
        Figure(
            f"outputs stay away after a cut, {what}",
            median(found[name]),
            "s",
            {},
            "<= 1 s",
            max(found[name]) <= 1,
            f"median of {CUTS}; longest {max(found[name]):.3f} s",
        )
        for name, what in (
            ("at once", "the path is there"),
            ("later", f"the path comes back after {AWAY:g} s (counted from then)"),
        )
    ]


def attach() -> Figure:
    """Until a notebook has all of a run that ended after it had printed 100 MB."""
    with kernel() as it:
        it.run(LOAD)
        it.run(f"%%remote detach name=long\n{LONG}")
        it.run("%remote wait long")
        say("attach")
        attached = it.run("%remote attach long")
        local = it.run(LONG)
        megabytes = local.characters / 1e6
        if attached.characters != local.characters:
            raise RuntimeError(f"{attached.characters} characters of {local.characters}")
    return Figure(
        f"attach to an ended run of {megabytes:.0f} MB",
        attached.seconds,
        "s",
        {"printed by a local cell": local.seconds},
        "",
        None,
        f"{megabytes / attached.seconds:.0f} MB/s, all of it shown",
    )


def _await_outputs(times: list[float], count: int) -> None:
    wanted = len(times) + count
    while len(times) < wanted:
        time.sleep(0.01)


def _longest_silence(times: list[float], since: float) -> float:
    late = [at for at in times if at >= since - 0.05]
    return max(after - before for before, after in itertools.pairwise(late))


@contextmanager
def _with_path(folder: Path) -> Iterator[None]:
    """Python processes that begin in here find modules in this folder first."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), before]))
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


@contextmanager
def _home() -> Iterator[Path]:
    """A state directory for sessions of this process."""
    home = Path(tempfile.mkdtemp(prefix="mlinfra-bench-"))
    before = os.environ.get("MLINFRA_HOME")
    os.environ["MLINFRA_HOME"] = str(home)
    try:
        yield home
    finally:
        os.environ.pop("MLINFRA_HOME")
        if before is not None:
            os.environ["MLINFRA_HOME"] = before
        shutil.rmtree(home, ignore_errors=True)
