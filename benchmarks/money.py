"""Nothing left running, no charge lost or doubled: `python -m benchmarks.money [--seeds A-B]`.

Each seed is a client with a ledger of its own that something happens to on its way from the quote
to the end of its machine: it is killed at a random instant, calls of the provider time out or are
done twice, clocks are wrong by an hour, the disk is full, another kernel races with it. Then a
later session sweeps, or nobody does and the machine must end by itself. Engines: the emulator of
Modal with its own bill, and `--engine local`, `ssh`, `slurm` or `container`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "integration")]

LIMIT = 120.0
"""Seconds that a client may take, and a forgotten machine to end by itself."""
TOLERANCE = 0.01
LEASE = 4.0
_CALLS = (
    "AppGetOrCreate",
    "ImageGetOrCreate",
    "SandboxCreate",
    "SandboxCreateV2",
    "SandboxGetTaskId",
    "SandboxListV2",
    "SandboxTerminate",
    "SandboxTerminateV2",
    "SandboxWait",
    "SandboxWaitV2",
    "TaskExecStart",
    "TaskExecStdinWrite",
    "VolumeGetOrCreate",
)
_FAULTS = ("before", "after", "twice")


class World:
    """An engine, nurseries of clients with a right and with wrong clocks, and how long a client
    lives that nobody disturbs."""

    def __init__(
        self, engine: Any, stack: ExitStack, home: Path, length: float | None = None
    ) -> None:
        self.engine = engine
        self.home = home
        self._stack = stack
        self._nurseries: dict[str, Any] = {}
        self.length = length or 0.0
        for _ in range(2 if length is None else 1):  # the first makes what is kept by all
            begun = time.monotonic()
            life = Life(self, random.Random(0), 0)
            life.start()
            assert life.wait() == 0, life.log()
            self.length = length or time.monotonic() - begun
            problems = life.settle()["problems"]
            assert not problems, problems

    def nursery(self, clock: str = "") -> Any:
        """Of clients that see such a clock."""
        from emulators.modal.world import faketime
        from mortal import nursery

        if clock not in self._nurseries:
            environment = faketime(clock) if clock else {}
            self._nurseries[clock] = self._stack.enter_context(nursery(environment))
        return self._nurseries[clock]


class Life:
    """One client and its ledger."""

    def __init__(self, world: World, source: random.Random, number: int, clock: str = "") -> None:
        self.world = world
        self.source = source
        self.home = Path(tempfile.mkdtemp(dir=world.home))
        self.job = {
            "home": str(self.home),
            "request": world.engine.request(number),
            "environment": world.engine.environment(self.home),
        }
        self.nursery = world.nursery(clock)
        self.kills = 0

    def start(self) -> int:
        """Begin; gives the client's process."""
        return int(self.nursery.start("life", **self.job))

    def kill(self, pid: int, within: float = 1.02) -> None:
        """Kill a client at a random instant of its life."""
        from mortal import at

        self.kills += 1
        at(pid, self.source.random() * self.world.length * within)

    def wait(self) -> int:
        """Until the client has ended."""
        return int(self.nursery.wait())

    def log(self) -> str:
        """What clients have said."""
        return (self.home / "log").read_text()[-3000:]

    def keys(self) -> list[str]:
        """The machines on record."""
        import sqlite3

        path = Path(str(self.job.get("state", self.home)), "ledger.sqlite")
        if not path.exists():
            return []
        with sqlite3.connect(path) as connection:
            return [row[0] for row in connection.execute("SELECT id FROM machines")]

    def ends_by_itself(self) -> float | None:
        """Wait for the end of what runs; gives the seconds that it took, None if it did not."""
        begun = time.monotonic()
        while self.world.engine.alive(self.keys()):
            if time.monotonic() - begun > LIMIT:
                return None
            time.sleep(0.05)
        return time.monotonic() - begun

    def settle(self) -> dict[str, Any]:
        """Sweep as a later session would, with a right clock, and compare with the engine."""
        engine = self.world.engine
        if hasattr(engine, "calm"):
            engine.calm()
        nursery, seconds = self.world.nursery(), None
        found = nursery.do("settled", **self.job)
        if found["open"]:  # what is on record as living has its own end, which must come
            seconds = self.ends_by_itself()
        swept = sum("ran on although" in text for text in found["found"])
        found = nursery.do("settled", **self.job, older=getattr(engine, "EARLIER", 0.0))
        keys = list(found["machines"])
        problems = []
        if engine.alive(keys):
            problems.append("a machine runs on")
        if found["open"]:
            problems.append("the ledger has a machine open")
        if found["open_runs"]:
            problems.append("the ledger has a run open")
        if found["again"]:
            problems.append(f"a second sweep found {found['again']}")
        if not found["sums"]:
            problems.append("the parts do not add up")
        bill = engine.bill(keys)
        if bill is not None:
            problems += self._compared(found, bill)
        return {
            "problems": problems,
            "kills": self.kills,
            "machines": len(keys),
            "swept": swept,
            "reasons": [reason for _, _, reason in found["machines"].values()],
            "ended_after": seconds,
            "bill": bill,
            "best": found["best"] / 1e6,
            "estimate": found["estimate"] / 1e6,
        }

    def _compared(self, found: dict[str, Any], bill: float) -> list[str]:
        service = self.world.engine.service
        mark = found["ledger"]
        there = [key for box in service.all_boxes() for key in box.tags.values()]
        ours = [key for key in there if key.startswith(mark)]
        problems = []
        if set(ours) - set(found["machines"]):
            problems.append("a machine is on no record")
        if abs(found["best"] - bill * 1e6) > max(TOLERANCE * bill * 1e6, 2.0 * len(ours)):
            problems.append(f"the ledger says {found['best']} micro-USD, the bill {bill * 1e6:.0f}")
        return problems


Scenario = Callable[[World, random.Random, int], dict[str, Any]]


def killed(world: World, source: random.Random, number: int) -> dict[str, Any]:
    """kill -9 of the client at a random instant; a later session sweeps."""
    life = Life(world, source, number)
    life.kill(life.start())
    life.wait()
    return life.settle()


def left(world: World, source: random.Random, number: int) -> dict[str, Any]:
    """kill -9 of the client while its machine runs; nobody sweeps, the machine ends by `idle`."""
    life = Life(world, source, number)
    life.job["forever"] = True
    return _left_alone(life, 1)


def busy(world: World, source: random.Random, number: int) -> dict[str, Any]:
    """kill -9 of the client in the middle of a cell; nobody sweeps, and the machine ends by its
    lease although the cell goes on."""
    life = Life(world, source, number)
    life.job["lease"] = LEASE
    return _left_alone(life, 2)


def _left_alone(life: Life, runs: int) -> dict[str, Any]:
    """Kill a client after so many runs have begun, and see how its machine ends."""
    source, pid = life.source, life.start()
    deadline = time.monotonic() + LIMIT
    while _runs(life) < runs and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(source.random() * 0.2)
    os.kill(pid, 9)
    life.kills += 1
    life.wait()
    seconds = life.ends_by_itself()
    outcome = life.settle() | {"ended_after": seconds}
    if seconds is None:
        outcome["problems"].append(f"it ran on for {LIMIT:g} s")
    return outcome


def _runs(life: Life) -> int:
    import sqlite3

    path = life.home / "ledger.sqlite"
    if not path.exists():
        return 0
    try:
        with sqlite3.connect(path) as connection:
            return int(connection.execute("SELECT count(*) FROM runs").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def calls(world: World, source: random.Random, number: int) -> dict[str, Any]:
    """Calls of the provider time out before they are done, after, or are done twice; every second
    client is killed too."""
    life = Life(world, source, number)
    fault = source.choice(_FAULTS)
    if hasattr(world.engine, "service"):
        names = source.sample(_CALLS, 3)
        times = source.choice((1, 12))
        world.engine.service.faults.disturbed = {name: (fault, times) for name in names}
    elif world.engine.program:
        life.job["environment"] |= world.engine.flaky(life.home, source.randrange(6), fault)
    pid = life.start()
    if source.random() < 0.5:
        life.kill(pid)
    life.wait()
    life.job["environment"] |= world.engine.environment(life.home)
    return life.settle()


def clocks(world: World, source: random.Random, number: int) -> dict[str, Any]:
    """The clock of the client, or of the machine, is wrong by an hour; the client is killed."""
    client, machine = source.choice((("+1h", ""), ("-1h", ""), ("", "+1h"), ("", "-1h")))
    if not hasattr(world.engine, "service"):
        client, machine = client or "+1h", ""
    life = Life(world, source, number, client)
    if machine:
        world.engine.service.faults.machine_clock = machine
    # Modal's client takes tokens for expired, and gets new ones again and again.
    life.kill(life.start(), 3.0 if client == "+1h" else 1.02)
    life.wait()
    return life.settle()


def full(world: World, source: random.Random, number: int) -> dict[str, Any]:
    """The disk with the ledger is full from a random instant on; every second client is killed."""
    life = Life(world, source, number)
    state = life.home / "state"
    state.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m,mode=700", "none", str(state)]
    subprocess.run(mount, check=True)
    try:
        life.job["state"] = str(state)
        pid = life.start()
        after = source.random() * world.length
        filler = threading.Timer(after, _fill, [state / "filler"])
        filler.start()
        if source.random() < 0.5:
            life.kill(pid)
        life.wait()
        filler.join()
        (state / "filler").unlink()
        return life.settle()
    finally:
        subprocess.run(["umount", "--lazy", str(state)], check=True)


def _fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass


def race(world: World, source: random.Random, number: int) -> dict[str, Any]:
    """Two kernels ask for one machine at once; both are killed at random instants."""
    life = Life(world, source, number)
    life.job["request"] |= {"machine": "shared"}
    pids = [life.start(), life.start()]
    moments = sorted(source.random() * world.length * 1.2 for _ in pids)
    source.shuffle(pids)
    begun = time.monotonic()
    from mortal import at

    for pid, moment in zip(pids, moments, strict=True):
        life.kills += 1
        at(pid, max(0.0, moment - (time.monotonic() - begun)))
    for _ in pids:
        life.wait()
    return life.settle()


SCENARIOS: tuple[Scenario, ...] = (
    killed,
    calls,
    killed,
    clocks,
    killed,
    race,
    killed,
    full,
    busy,
    left,
)


def work(engine_name: str, seeds: list[int]) -> tuple[list[dict[str, Any]], float]:
    """Run the seeds on an engine; gives their outcomes and how long an undisturbed client lives."""
    from engines import engine

    home = Path(tempfile.mkdtemp(prefix="mlinfra-money-"))
    found = []
    try:
        with ExitStack() as stack:
            it = stack.enter_context(engine(engine_name, home / "engine"))
            world = World(it, stack, home)
            for seed in seeds:
                scenario = SCENARIOS[seed % len(SCENARIOS)]
                begun = time.monotonic()
                try:
                    outcome = scenario(world, random.Random(seed), seed)
                except Exception as error:
                    outcome = {"problems": [f"{type(error).__name__}: {error}"]}
                seconds = time.monotonic() - begun
                outcome |= {"seed": seed, "scenario": scenario.__name__, "seconds": seconds}
                found.append(outcome)
                print(json.dumps(outcome), file=sys.stderr, flush=True)
            return found, world.length
    finally:
        shutil.rmtree(home, ignore_errors=True)


def report(engine_name: str, found: list[dict[str, Any]], length: float, seconds: float) -> str:
    """The summary in Markdown."""
    lines = [
        f"# Money on `{engine_name}`, {time.strftime('%Y-%m-%d %H:%M %Z')}",
        "",
        f"{platform.system()} {platform.release()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}; {seconds:.0f} s. An undisturbed client takes "
        f"{length:.1f} s from its quote to the end of its machine.",
        "",
        "| scenario | what | seeds | kills | machines | stopped by a sweep | engine's bill, USD "
        "| ledger, USD | ledger's own estimate, USD | problems |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = [(it.__name__, (it.__doc__ or "").split(";")[0].split(".")[0]) for it in SCENARIOS]
    for name, what in [*dict.fromkeys(rows), ("all", "")]:
        mine = [it for it in found if name in ("all", it["scenario"])]
        if not mine:
            continue
        kills, machines, swept = (
            sum(it.get(key, 0) for it in mine) for key in ("kills", "machines", "swept")
        )
        bills = [it["bill"] for it in mine if it.get("bill") is not None]
        bill = f"{sum(bills):.6f}" if bills else "none"
        best, estimate = (sum(it.get(key, 0.0) for it in mine) for key in ("best", "estimate"))
        problems = sum(len(it["problems"]) for it in mine)
        cells = [name, " ".join(what.split()), len(mine), kills, machines, swept, bill]
        cells += [f"{best:.6f}", f"{estimate:.6f}", problems]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for name, limit in (("left", f"`idle` at {_idle():g} s"), ("busy", f"a lease of {LEASE:g} s")):
        mine = [it for it in found if it["scenario"] == name and it.get("ended_after") is not None]
        ends = [it["ended_after"] for it in mine]
        if ends:
            reasons = sorted({reason for it in mine for reason in it["reasons"]})
            lines += [
                "",
                f"`{name}`: {len(ends)} machines that nobody stopped ended by themselves "
                f"{min(ends):.1f} to {max(ends):.1f} s after their client's death, with {limit}. "
                f"The ledger's reasons: {', '.join(reasons)}.",
            ]
    for it in found:
        lines += [f"- seed {it['seed']} ({it['scenario']}): {text}" for text in it["problems"]]
    return "\n".join(lines) + "\n"


def _idle() -> float:
    from mortal import IDLE

    return IDLE


def main() -> None:
    """Run the seeds and write the summary."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.money", description=__doc__)
    parser.add_argument("--seeds", default="0-249", help="A-B, both included")
    parser.add_argument("--engine", default="modal", help="modal, local, ssh, slurm or container")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the report")
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition("-")
    begun = time.monotonic()
    found, length = work(arguments.engine, list(range(int(first), int(last or first) + 1)))
    text = report(arguments.engine, found, length, time.monotonic() - begun)
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = f"money-{arguments.engine}-{time.strftime('%Y-%m-%d')}-{arguments.seeds}"
    (arguments.output / f"{name}.md").write_text(text)
    (arguments.output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(text)
    if any(it["problems"] for it in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
