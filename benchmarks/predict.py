"""How well times are predicted: `python -m benchmarks predict`.

Five workloads (a perceptron, a convolutional network and a transformer block of torch, gradient
boosting of scikit-learn, a group-by and a join of pandas) run as cells on ``local`` with one core
and with two, on a host by ssh (a real sshd on loopback) and in a container, :data:`ROUNDS` times
each, in shuffled order. Then each run is predicted by what came before it:

- after one run of the cell there;
- after one run of the cell elsewhere, the four other cells having run on both machines;
- after one run of the cell elsewhere and nothing else.

The error is that of the prediction beside the time that the run took; the coverage is the share of
runs within the interval, which promises 80 %.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Figure, say
from mlinfra_sdk import Session, paths
from mlinfra_sdk.frontend import Console
from mlinfra_sdk.ledger import Ledger, Measurement, Price
from mlinfra_sdk.ledger.history import cell_key
from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.predict import Place, estimate
from mlinfra_sdk.spec import Request

ROOT = Path(__file__).parents[1]
ROUNDS = 3

_TORCH = """
import torch
torch.manual_seed(0)
def train(model, x, steps):
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()
"""
WORKLOADS = {
    "MLP": _TORCH
    + """
model = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 10))
train(model, torch.randn(256, 512), 350)
""",
    "CNN": _TORCH
    + """
model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3), torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 10))
train(model, torch.randn(64, 3, 32, 32), 60)
""",
    "transformer block": _TORCH
    + """
model = torch.nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
train(model, torch.randn(8, 128, 256), 30)
""",
    "gradient boosting": """
import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor
x = np.random.default_rng(0).random((60_000, 20))
model = HistGradientBoostingRegressor(max_iter=100, early_stopping=False).fit(x, x.sum(1))
""",
    "pandas": """
import numpy as np, pandas as pd
random = np.random.default_rng(0)
n = 1_200_000
left = pd.DataFrame({"key": random.integers(0, 50_000, n), "value": random.random(n)})
for _ in range(6):
    means = left.groupby("key").value.agg(["mean", "std", "median"]).reset_index()
    joined = left.merge(means, on="key").sort_values("value")
""",
}


SITE = sysconfig.get_path("purelib")
"""Where the workloads' packages are: all machines are this one, and use them."""
PREPARE = f"""
import sys
sys.path.append({SITE!r})
import torch, pandas, sklearn.ensemble
model = torch.nn.Linear(1, 1)
torch.optim.SGD(model.parameters(), 1e-3)
model(torch.ones(1)).backward()
"""
"""What a kernel does once is not a workload's: the first optimizer imports torch's compiler, which
takes three seconds of whichever cell comes first."""


@dataclass(frozen=True)
class Measured:
    """A run: of which workload, where, how long, and what it has used."""

    cell: str
    place: Place
    seconds: float
    used: list[Measurement]


def main() -> list[Figure]:
    """All figures."""
    with tempfile.TemporaryDirectory(prefix="mlinfra-") as name:
        runs = collect(Path(name))
        return evaluate(runs, Path(name))


@contextmanager
def _targets(folder: Path) -> Iterator[dict[str, bool]]:
    """Names of targets, and whether they have one core only."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "integration")]
    from sshd import running
    from test_container import ENGINE, LIMITS, image

    image()
    seen = dict.fromkeys(["/usr", sys.base_prefix, sys.prefix])
    extra = json.dumps([*LIMITS, *(f"--volume={path}:{path}:ro" for path in seen)])
    (folder / "volume").mkdir()
    (folder / "config").mkdir()
    with running(folder / "box") as box, box.known():
        (folder / "config" / "config.toml").write_text(
            '[targets.one]\nprovider = "local"\n[targets.two]\nprovider = "local"\n'
            f'[targets.inside]\nprovider = "container"\nimage = "mlinfra-test"\n'
            f'engine = "{ENGINE}"\nextra = {extra}\nvolume = "{folder}/volume"\n'
            f'python = "{sys.base_prefix}/bin/python3"\n'
        )
        yield {"one": True, "two": False, "ssh:box": False, "inside": False}


def collect(folder: Path) -> list[Measured]:
    """Run everything; each visit to a target has a machine of its own."""
    home = folder / "home"
    source = random.Random(1)
    with _targets(folder) as targets:
        for number in range(ROUNDS):
            for target in source.sample(sorted(targets), len(targets)):
                say(f"round {number + 1}: {target}")
                names = ",".join(source.sample(sorted(WORKLOADS), len(WORKLOADS)))
                command = [sys.executable, "-m", "benchmarks.predict", target, names]
                if targets[target]:
                    command = ["taskset", "--cpu-list", "0", *command]
                subprocess.run(
                    command,
                    check=True,
                    cwd=ROOT,
                    env={
                        **os.environ,
                        "MLINFRA_HOME": str(home),
                        "MLINFRA_BENCH_CONFIG": str(folder / "config" / "config.toml"),
                    },
                )
    ledger = Ledger.open(home / "ledger.sqlite")
    try:
        machines = {it.id: it for it in ledger.machines()}
        return [
            Measured(
                run.cell,
                Place(machines[run.machine_id].provider),
                run.seconds or 0.0,
                ledger.measurements(run.id),
            )
            for run in ledger.runs()
            if run.cell
        ]
    finally:
        ledger.close()


def visit(target: str, names: list[str]) -> None:
    """Run workloads at a target, in a process of its own."""
    config = Path(os.environ["MLINFRA_BENCH_CONFIG"])
    paths.config_file = lambda: config
    os.chdir(tempfile.mkdtemp())
    request = Request(on=target, env="none", sync=False)
    with Session(namespace={}, request=request, notebook="bench") as session:
        session.run(PREPARE)
        for name in names:
            code = WORKLOADS[name]
            found = cell_names(code, session.namespace, code)
            session.execute(code, found, frontend=Console(), count=1, cell=cell_key(code)).get()
            say(f"  {name}")


def evaluate(runs: list[Measured], folder: Path) -> list[Figure]:
    """Predict runs by others and compare."""
    first: dict[tuple[str, Place], Measured] = {}
    rest: list[Measured] = []
    for run in runs:
        if first.setdefault((run.cell, run.place), run) is not run:
            rest.append(run)
    names = {cell_key(code): name for name, code in WORKLOADS.items()}
    for (cell, place), run in first.items():
        again = [f"{it.seconds:.2f}" for it in rest if (it.cell, it.place) == (cell, place)]
        say(f"{names[cell]} on {place.target}: {run.seconds:.2f} s, then {', '.join(again)}")
    same, shown, alone = [], [], []
    for run in rest:
        same.append(_compared([first[run.cell, run.place]], run, folder))
    places = sorted({place for _, place in first}, key=lambda it: it.target)
    for run in first.values():
        for place in places:
            if place == run.place:
                continue
            elsewhere = first[run.cell, place]
            others = [it for it in first.values() if it.cell != run.cell]
            pair = [it for it in others if it.place in (run.place, place)]
            shown.append(_compared([*pair, elsewhere], run, folder))
            alone.append(_compared([elsewhere], run, folder))
    return [
        *_figures("after one run there", same, "<= 25"),
        *_figures("after one run elsewhere, four other cells known on both", shown, "<= 25"),
        *_figures("after one run elsewhere, nothing else known", alone, ""),
    ]


def _compared(known: list[Measured], run: Measured, folder: Path) -> tuple[float, bool, float]:
    """Error in percent, whether it lies within the interval, and how wide that is."""
    path = folder / "subset.sqlite"
    path.unlink(missing_ok=True)
    ledger = Ledger.open(path)
    try:
        price = Price(0, "your own machine", time.strftime("%Y-%m-%d"))
        for it in known:
            machine = ledger.intend_machine(name="m", provider=it.place.target, price=price)
            number = ledger.open_run(machine, notebook="bench", cell=it.cell)
            ledger.close_run(number, status="done", seconds=it.seconds)
            ledger.measure(number, it.used)
        (found,) = estimate(ledger, "bench", run.cell, [run.place])
    finally:
        ledger.close()
    assert found is not None
    error = 100 * abs(found.seconds / run.seconds - 1)
    return error, found.low <= run.seconds <= found.high, found.high / found.low


def _figures(when: str, found: list[tuple[float, bool, float]], goal: str) -> list[Figure]:
    errors = sorted(it[0] for it in found)
    error, ninety = statistics.median(errors), errors[math.ceil(0.9 * len(errors)) - 1]
    width = statistics.median(it[2] for it in found)
    within = 100 * statistics.fmean(it[1] for it in found)
    met = error <= 25 if goal else None
    note = f"{len(found)} predictions; 9 of 10 within {ninety:.0f} %"
    return [
        Figure(f"median error {when}", error, "%", {}, goal, met, note),
        Figure(
            f"runs within the interval {when}", within, "%", {}, "80 are promised",
            note=f"its upper end is {width:.2f} times its lower end in the middle",
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    visit(sys.argv[1], sys.argv[2].split(","))
