"""Nothing lost: cuts and kills by the hundred, `python -m benchmarks.chaos [--seeds A-B]`.

Each seed is one scenario through the whole stack (client, link, agent, kernel), on a machine that
shares nothing with this process, behind a proxy that cuts connections at random bytes. A seed
that takes too long counts as hung. A table of what was done and found is written to the results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

LIMIT = 300.0
"""Seconds after which a seed hangs."""
LINES = 100_000
TRANSFER = 500_000_000


class Outcome(dict[str, Any]):
    """What one seed did: ``faults`` (cuts and kills), ``messages``, ``megabytes``, ``problems``."""


Scenario = Callable[["World", random.Random], Outcome]


class World:
    """A net, and clients on it."""

    def __init__(self, home: Path, path: Any) -> None:
        self.home = home
        self.path = path
        self._distant: Any = None

    @property
    def distant(self) -> Any:
        """A client whose machine is kept between seeds."""
        from faulty import Client

        from mlinfra_sdk.spec import Request

        if self._distant is None:
            self._distant = Client(Request(on="chaos", isolate=True, env="none"))
            self._distant.run("import numpy")
        return self._distant

    def plan(self, source: random.Random, count: int, up: int, down: int) -> None:
        """So many connections that are cut, each in some way, then unharmed ones. ``up`` and
        ``down`` are the most bytes that one of them carries in a direction."""
        from chaos import Plan

        plans = []
        for _ in range(count):
            kind = source.random()
            cut: tuple[int | None, int | None] = (None, int(down ** source.random()))
            if source.random() < 0.4:
                cut = (int(up ** source.random()), None)
            if kind < 0.75:
                plans.append(Plan(cut))
            elif kind < 0.85:
                plans.append(Plan(cut, delay=source.random() / 100))
            elif kind < 0.92:
                plans.append(Plan(cut, rate=2e7))
            else:
                plans.append(Plan(late=source.random() / 5))
        self.path.up()
        self.path.plan(lambda number: plans[number] if number < count else Plan())
        self.path.cut()

    def close(self) -> None:
        self.path.up()
        if self._distant is not None:
            self._distant.session.stop()


@contextmanager
def _fresh(**settings: Any) -> Iterator[Any]:
    from faulty import client

    with client(**({"on": "chaos", "isolate": True} | settings)) as it:
        yield it


def cuts(world: World, source: random.Random) -> Outcome:
    """100,000 lines, displays and comm messages, over cuts at random bytes."""
    from faulty import Recorder, Work

    work, recorder = Work(LINES, pause=0.002), Recorder()
    it = world.distant
    before = world.path.proxy.cuts
    world.plan(source, 24, 1 << 11, 1 << 18)  # up go hardly more than acknowledgements
    it.run(work.code, recorder)
    problems = work.problems(recorder.records)
    if it.namespace["work_total"] != work.total:
        problems.append("a variable is wrong")
    return Outcome(
        faults=world.path.proxy.cuts - before, messages=len(recorder.records), problems=problems
    )


def transfer(world: World, source: random.Random) -> Outcome:
    """An array of 500 MB there and back, changed, over cuts at random bytes."""
    import numpy

    it = world.distant
    original = numpy.random.default_rng(source.randrange(1 << 30)).random(TRANSFER // 8)
    array = it.namespace["array"] = original.copy()
    before = world.path.proxy.cuts
    world.plan(source, 14, 1 << 28, 1 << 28)
    it.run("array += 1")
    it.session.pull("array")
    problems = []
    if it.namespace["array"] is not array and not hasattr(array, "shape"):
        problems.append("another array came back")
    if not numpy.array_equal(it.namespace["array"], original + 1):
        problems.append("the array is corrupted")
    it.run("del array")
    return Outcome(
        faults=world.path.proxy.cuts - before, megabytes=2 * TRANSFER / 1e6, problems=problems
    )


def away(world: World, source: random.Random) -> Outcome:
    """Cut off for longer than ``reconnect=``, then attached again; outputs come whole."""
    import threading

    from faulty import Recorder, Work

    from mlinfra_sdk.errors import RunDetached

    problems = []
    with _fresh(reconnect=0.3) as it:
        it.run("1")
        work, recorder, again = Work(20_000, pause=0.01), Recorder(), Recorder()
        threading.Timer(source.random() * 1.5, world.path.down).start()
        try:
            it.run(work.code, recorder)
            records = recorder.records
        except RunDetached:
            world.path.up()
            it.session.attach(recorder.run, frontend=again)
            records = again.records
        world.path.up()
        problems += work.problems(records)
        if it.namespace["work_total"] != work.total:
            problems.append("a variable is wrong")
        if it.session.runs():
            problems.append("a run is left")
    return Outcome(faults=1, messages=len(records), problems=problems)


def client_killed(world: World, source: random.Random) -> Outcome:
    """kill -9 of the client at a random moment of its life; another process brings the run back,
    or runs it if it had not begun."""
    from faulty import Recorder, Work

    script = world.home / "client.py"
    script.write_text(
        "import sys, os\nfrom faulty import Client, Recorder, Work\n"
        "from mlinfra_sdk.spec import Request\n"
        "it = Client(Request(on='chaos', isolate=True, env='none', machine='m'))\n"
        "print('go', flush=True)\n"
        "it.namespace['data'] = os.urandom(20_000_000)\n"
        "work = Work(20_000, pause=0.01)\n"
        "it.run(work.code + 'size = len(data)', Recorder())\n"
        "os._exit(0)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(source.random() * 4.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    problems = []
    with _fresh(machine="m") as it:
        work, recorder = Work(20_000, pause=0.01), Recorder()
        runs = it.session.runs()
        if runs:
            it.session.attach(runs[0].run, frontend=recorder)
            if it.namespace.get("size") != 20_000_000:
                problems.append("a variable is lost")
        elif process.returncode == -signal.SIGKILL:
            it.run(work.code, recorder)
        if recorder.records:
            problems += work.problems(recorder.records)
        if len(runs) > 1 or it.session.runs():
            problems.append("a run is doubled or left")
    return Outcome(faults=1, messages=len(recorder.records), problems=problems)


def agent_killed(world: World, source: random.Random) -> Outcome:
    """kill -9 of the agent at a random moment; all that it had published is still there."""
    from faulty import Recorder, Work, agents

    from mlinfra_sdk.errors import MachineLost

    problems: list[str] = []
    with _fresh() as it:
        it.run("1")
        work, recorder = Work(20_000, pause=0.01), Recorder()
        handle = it.start(work.code, label="train")
        seen = 0
        deadline = time.monotonic() + source.random() * 1.5
        while time.monotonic() < deadline:
            info = handle.info()
            seen = info.messages if info else seen
        folder = it.session.machine.handle.data["folder"]
        for agent in agents(world.home):
            if folder in agent.cmdline():
                agent.kill()
                agent.wait()
        try:
            it.session.attach("train", frontend=recorder)
            problems += work.problems(recorder.records)  # it had ended before
        except MachineLost:
            numbers = [record.number for record in recorder.records]
            if numbers != list(range(1, len(numbers) + 1)):
                problems.append("messages are lost or doubled")
            if len(numbers) < seen:
                problems.append(f"{len(numbers)} of {seen} messages that were acknowledged")
        if it.session.runs():
            problems.append("a run is left")
        if it.run("6 * 7").value != 42:
            problems.append("the next run fails")
    return Outcome(faults=1, messages=len(recorder.records), problems=problems)


def kernel_killed(world: World, source: random.Random) -> Outcome:
    """kill -9 of the kernel at a random moment, with runs that wait; all are told."""
    from faulty import Recorder, Work

    from mlinfra_sdk.errors import KernelDied

    problems: list[str] = []
    with _fresh() as it:
        it.run("import os\npid = os.getpid()")
        work = Work(20_000, pause=0.01)
        labels = [f"run{number}" for number in range(4)]
        for label in labels:
            it.start(work.code, label=label)
        time.sleep(source.random() * 2)
        os.kill(it.namespace["pid"], signal.SIGKILL)
        messages = 0
        for label in labels:
            recorder = Recorder()
            try:
                it.session.attach(label, frontend=recorder)
                problems += work.problems(recorder.records)
            except KernelDied:
                numbers = [record.number for record in recorder.records]
                if numbers != list(range(1, len(numbers) + 1)):
                    problems.append("messages are lost or doubled")
            messages += len(recorder.records)
        if it.session.runs():
            problems.append("a run is left")
        if it.run("6 * 7").value != 42:
            problems.append("the next run fails")
    return Outcome(faults=1, messages=messages, problems=problems)


SCENARIOS: tuple[Scenario, ...] = (
    cuts,
    client_killed,
    cuts,
    agent_killed,
    cuts,
    kernel_killed,
    cuts,
    transfer,
    cuts,
    away,
)


def _work(home: Path, seeds: list[int]) -> None:
    """In a process of its own: run the seeds and print an outcome for each, as JSON lines."""
    from chaos import net
    from faulty import processes

    os.environ["MLINFRA_HOME"] = str(home)
    with net(home / "net") as path:
        world = World(home, path)
        for seed in seeds:
            scenario = SCENARIOS[seed % len(SCENARIOS)]
            print(json.dumps({"seed": seed, "begins": scenario.__name__}), flush=True)
            start = time.monotonic()
            try:
                outcome = scenario(world, random.Random(seed))
            except Exception as error:
                outcome = Outcome(problems=[f"{type(error).__name__}: {error}"])
            outcome |= {"seed": seed, "seconds": time.monotonic() - start}
            print(json.dumps(outcome), flush=True)
        world.close()
    left = processes(home)
    machines = [str(it) for it in (home / "machines").iterdir()]
    print(json.dumps({"left": [*map(str, left), *machines]}), flush=True)


def run(seeds: list[int]) -> list[dict[str, Any]]:
    """Run the seeds, in a fresh process after each one that hangs."""
    found: list[dict[str, Any]] = []
    while seeds:
        home = Path(tempfile.mkdtemp(prefix="mlinfra-chaos-"))
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.chaos", "--worker", str(home), json.dumps(seeds)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        pending, current, heard = b"", seeds[0], time.monotonic()
        while process.poll() is None or pending:
            pending += process.stdout.read() or b""
            line, newline, rest = pending.partition(b"\n")
            if newline:
                pending, heard = rest, time.monotonic()
                item = json.loads(line)
                if "begins" in item:
                    current = item["seed"]
                elif "left" in item:
                    if item["left"]:
                        found.append({"seed": current, "problems": [f"left: {item['left']}"]})
                else:
                    found.append(item)
                    seeds = [seed for seed in seeds if seed != item["seed"]]
                    print(f"{item}", file=sys.stderr, flush=True)
            elif time.monotonic() - heard > LIMIT:
                found.append({"seed": current, "hung": True, "problems": []})
                seeds = [seed for seed in seeds if seed != current]
                break
            elif process.poll() is not None:
                break
            else:
                time.sleep(0.05)
        else:
            pass
        if process.poll() not in (None, 0) and current in seeds:
            found.append({"seed": current, "problems": ["the client crashed"]})
            seeds = [seed for seed in seeds if seed != current]
        _clear(home, process)
    return found


def _clear(home: Path, process: subprocess.Popen[bytes]) -> None:
    from faulty import processes

    process.kill()
    process.wait()
    for left in processes(home):
        left.kill()
    shutil.rmtree(home, ignore_errors=True)


def report(found: list[dict[str, Any]], seconds: float) -> str:
    """The summary in Markdown."""
    lines = [
        f"# Chaos, {time.strftime('%Y-%m-%d %H:%M %Z')}",
        "",
        f"{platform.system()} {platform.release()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}; {seconds:.0f} s",
        "",
        "| scenario | what | seeds | cuts and kills | messages | MB | problems | hung |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = [(it.__name__, (it.__doc__ or "").split(";")[0].split(".")[0]) for it in SCENARIOS]
    for name, what in [*dict.fromkeys(rows), ("all", "")]:
        mine = [
            it for it in found if name in ("all", SCENARIOS[it["seed"] % len(SCENARIOS)].__name__)
        ]
        sums = [sum(it.get(key, 0) for it in mine) for key in ("faults", "messages", "megabytes")]
        problems = sum(len(it["problems"]) for it in mine)
        hung = sum(1 for it in mine if it.get("hung"))
        cells = [name, " ".join(what.split()), len(mine), *(f"{it:.0f}" for it in sums)]
        lines.append(f"| {' | '.join(map(str, [*cells, problems, hung]))} |")
    for it in found:
        lines += [f"- seed {it['seed']}: {text}" for text in it["problems"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the seeds and write the summary."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--seeds", default="0-99", help="A-B, both included")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(Path(arguments.worker[0]), json.loads(arguments.worker[1]))
        return
    first, _, last = arguments.seeds.partition("-")
    start = time.monotonic()
    found = run(list(range(int(first), int(last or first) + 1)))
    seconds = time.monotonic() - start
    text = report(found, seconds)
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = f"chaos-{time.strftime('%Y-%m-%d')}-{arguments.seeds}"
    (arguments.output / f"{name}.md").write_text(text)
    (arguments.output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(text)
    if any(it["problems"] or it.get("hung") for it in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
