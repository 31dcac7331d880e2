"""Training survives anything: kills at random instants, `python -m benchmarks.preemption
[--kinds kernel,agent,machine,container,modal,slurm] [--seeds 0-29]`.

Each seed trains a small model (torch, scikit-learn or XGBoost; numpy alone where the machine has an
environment of its own) in one cell that saves all the time, and kills something once or twice while
it runs: the kernel, the agent, the whole machine with its disk, podman's container, Modal's
sandbox, Slurm's job. The cell must end by itself, with the weights and the loss curve of an
undisturbed run, bit by bit. A table of what was done and found is written to the results.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

STEPS = 120
_LOOP = f"""
for step in mlinfra_sdk.checkpoint(NAME).loop(range({STEPS}), state=state, every=4):
    time.sleep(0.008)
"""
_NUMPY = (
    """
import time, numpy as np, mlinfra_sdk
generator = np.random.default_rng(0)
weights, losses = np.zeros((300, 300)), []
state = dict(generator=generator, weights=weights, losses=losses)
"""
    + _LOOP
    + """
    x = generator.normal(size=(300,))
    weights += np.outer(x, np.tanh(weights @ x + 1)) / 300
    losses.append(float(np.square(weights).sum()))
final = weights.tobytes()
"""
)
_TORCH = (
    """
import time, torch, mlinfra_sdk
torch.manual_seed(0); torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(50, 300), torch.nn.Dropout(), torch.nn.Linear(300, 1))
optimizer, losses = torch.optim.AdamW(model.parameters()), []
state = dict(model=model, optimizer=optimizer, losses=losses, rng="all")
"""
    + _LOOP
    + """
    x = torch.randn(32, 50)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(loss.item())
final = b"".join(it.numpy().tobytes() for it in model.state_dict().values())
del model, optimizer, state, loss, x
"""
)
_SKLEARN = (
    """
import time, numpy as np, mlinfra_sdk
from sklearn.linear_model import SGDClassifier
generator, model, losses = np.random.default_rng(0), SGDClassifier(random_state=0), []
state = dict(generator=generator, model=model, losses=losses)
"""
    + _LOOP
    + """
    x = generator.normal(size=(50, 20))
    model.partial_fit(x, x.sum(1) > 0, classes=[False, True])
    losses.append(float(model.decision_function(x).sum()))
final = model.coef_.tobytes() + model.intercept_.tobytes()
"""
)
_XGBOOST = (
    """
import time, numpy as np, xgboost, mlinfra_sdk
x = np.random.default_rng(0).normal(size=(300, 8)).astype("f4")
data = xgboost.DMatrix(x, label=(x.sum(1) > 0).astype("f4"))
booster = xgboost.Booster({"objective": "binary:logistic", "nthread": 1}, [data])
losses, state = [], dict(booster=booster)
state["losses"] = losses
"""
    + _LOOP
    + """
    booster.update(data, step)
    losses.append(float(booster.eval(data).rpartition(":")[2]))
final = bytes(booster.save_raw("ubj"))
del data, booster, state
"""
)
CELLS = {"torch": _TORCH, "scikit-learn": _SKLEARN, "xgboost": _XGBOOST, "numpy": _NUMPY}
Kill = Callable[[], None]


@contextlib.contextmanager
def local(home: Path, kind: str) -> Iterator[tuple[dict[str, object], Kill, tuple[str, ...]]]:
    """A machine here that has everything of its own."""
    from faulty import agents, kernels, processes

    def kill() -> None:
        targets = {"kernel": kernels, "agent": agents, "machine": processes}[kind](home)
        for process in targets:
            with contextlib.suppress(Exception):
                process.kill()
        if kind == "machine":
            for folder in (home / "machines").iterdir():
                shutil.rmtree(folder, ignore_errors=True)

    yield {"isolate": True}, kill, ("torch", "scikit-learn", "xgboost")


@contextlib.contextmanager
def modal(home: Path, kind: str) -> Iterator[tuple[dict[str, object], Kill, tuple[str, ...]]]:
    """Sandboxes of the emulator, which are taken back."""
    from emulators.modal import emulator

    with emulator() as service:
        os.environ.update(service.environment)

        def kill() -> None:
            for box in service.boxes():
                service.preempt(box)

        yield {"on": "modal"}, kill, ("numpy",)


@contextlib.contextmanager
def slurm(home: Path, kind: str) -> Iterator[tuple[dict[str, object], Kill, tuple[str, ...]]]:
    """Jobs of a real Slurm, which are killed."""
    from slurm_cluster import slurm as started

    with started() as cluster:
        os.environ.update(cluster.env)

        def kill() -> None:
            for job in cluster.command("squeue", "--noheader", "--format=%i").split():
                with contextlib.suppress(Exception):
                    cluster.command("scancel", "--signal=KILL", "--full", job)

        yield {"on": "slurm", "env": "mirror"}, kill, ("numpy",)


@contextlib.contextmanager
def container(home: Path, kind: str) -> Iterator[tuple[dict[str, object], Kill, tuple[str, ...]]]:
    """Containers of podman, which are killed and removed."""
    from engines import Container, engine

    with engine("container", home.parent / "engine") as it:
        os.environ.update(it.environment(home))
        podman = ["podman", *Container.OPTIONS]

        def kill() -> None:
            done = subprocess.run([*podman, "ps", "--quiet"], capture_output=True, text=True)
            for name in done.stdout.split():
                subprocess.run([*podman, "rm", "--force", "--time=0", name], capture_output=True)

        yield {**it.request(0), "env": "mirror"}, kill, ("numpy",)


PLACES = {
    "kernel": local,
    "agent": local,
    "machine": local,
    "container": container,
    "modal": modal,
    "slurm": slurm,
}


def main() -> None:
    """Run the seeds of each kind."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preemption", description=__doc__)
    parser.add_argument("--kinds", default="kernel,agent,machine")
    parser.add_argument("--seeds", default="0-29")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    first, _, last = arguments.seeds.partition("-")
    seeds = range(int(first), int(last or first) + 1)
    rows = [row for kind in arguments.kinds.split(",") for row in run(kind, seeds)]
    report = render(rows)
    stem = f"preemption-{time.strftime('%Y-%m-%d')}-{arguments.kinds.replace(',', '-')}"
    arguments.output.mkdir(exist_ok=True)
    (arguments.output / f"{stem}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (arguments.output / f"{stem}.md").write_text(report)
    print(report)
    sys.exit(any(row["problem"] for row in rows))


def run(kind: str, seeds: range) -> list[dict[str, Any]]:
    """All seeds of one kind, on machines of one state directory."""
    from faulty import client

    rows = []
    with tempfile.TemporaryDirectory(prefix="mlinfra-") as folder:
        home = Path(folder, "home")
        os.environ["MLINFRA_HOME"] = str(home)
        (Path(folder) / "work").mkdir()
        os.chdir(Path(folder) / "work")
        with PLACES[kind](home, kind) as (settings, kill, cells), client(**settings) as it:
            whole: dict[str, tuple[Any, Any, float]] = {}
            for seed in seeds:
                name = cells[seed % len(cells)]
                if name not in whole:
                    for _ in range(2):  # the second one knows how long it takes
                        _, took = train(it, f"whole-{name}", name, lambda: None, [])
                    whole[name] = it.namespace["losses"], it.namespace["final"], took
                rows.append(one(it, kind, seed, name, kill, whole[name]))
                print({key: rows[-1][key] for key in ("kind", "seed", "kills", "problem")})
    return rows


def one(
    it: Any, kind: str, seed: int, name: str, kill: Kill, whole: tuple[Any, Any, float]
) -> dict[str, Any]:
    """One seed: what was done, and what was wrong with it."""
    source = random.Random(f"{kind} {seed}")
    losses, final, took = whole
    count = 1 + (seed % 3 == 2)
    instants = [source.uniform(0.0, took) for _ in range(count)]
    problem, seconds, begun = "", 0.0, []
    try:
        begun, seconds = train(it, f"{kind}-{seed}", name, kill, instants)
        if it.namespace["losses"] != losses:
            problem = "another loss curve"
        elif it.namespace["final"] != final:
            problem = "other weights"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    return {
        "kind": kind, "seed": seed, "model": name, "instants": instants, "kills": len(begun),
        "seconds": seconds, "undisturbed": took, "problem": problem,
    }  # fmt: skip


def train(
    it: Any, checkpoint: str, name: str, kill: Kill, instants: list[float]
) -> tuple[list[float], float]:
    """Run the cell, always to its end: a kill may come before its first checkpoint. Gives the
    instants at which something was killed while it ran, and the seconds it took."""
    import msgspec
    from faulty import Recorder

    done: list[float] = []
    began = time.monotonic()
    over = threading.Event()

    class Killer(Recorder):
        def phase(self, phase: str) -> None:
            super().phase(phase)
            if phase == "running" and len(done) < len(instants):
                threading.Timer(instants[len(done)], act).start()

    def act() -> None:
        if not over.is_set():
            done.append(time.monotonic() - began)
            kill()

    it.namespace.clear()
    it.session.request = msgspec.structs.replace(it.session.request, recover="always")
    try:
        code = CELLS[name].replace("NAME", repr(checkpoint))
        it.run(code, Killer()).get()
    finally:
        over.set()
    return done, time.monotonic() - began


def render(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    lines = [
        f"# Kills at random instants, {time.strftime('%Y-%m-%d %H:%M %Z')}",
        "",
        f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "",
        "| what was killed | model | runs | kills | bitwise the same | problems |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, model in sorted({(row["kind"], row["model"]) for row in rows}):
        own = [row for row in rows if (row["kind"], row["model"]) == (kind, model)]
        problems = [f"{row['seed']}: {row['problem']}" for row in own if row["problem"]]
        kills = sum(row["kills"] for row in own)
        lines.append(
            f"| {kind} | {model} | {len(own)} | {kills} | {len(own) - len(problems)} | "
            f"{'; '.join(problems) or 'none'} |"
        )
    lines.append("")
    lines.append(f"{sum(row['kills'] for row in rows)} kills in {len(rows)} runs.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
