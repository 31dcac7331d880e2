"""What checkpoints cost a training while it goes on: `python -m benchmarks streaming`.

The same training in remote cells, in turns: without checkpoints, and in ``ckpt.loop``, whose
checkpoints are copied, hashed, written there, sent here and written here while the training goes
on. Client and machine are this computer. So once training has one core, the client another, and
the machine's own work competes with training; once a core is free, as it is where a GPU trains; and
once training takes all cores, which pay for the machine and the client. The training of ``gpu``,
part of the suite of that name, is on a GPU.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Figure, median, say
from mlinfra_sdk.checkpoints.store import CheckpointStore
from mlinfra_sdk.session import Session

ROUNDS = 6
WIDTH, LAYERS = 2000, 4
BATCH = {"cpu": 64, "cuda": 16384}
EVERY_S = 15
SECONDS = 25
GOAL = 0.97
PATIENCE_S = 120

TRAIN = """
import time, torch, mlinfra_sdk
torch.set_num_threads({threads})
torch.manual_seed(0)
layers = [torch.nn.Linear({width}, {width}) for _ in range({layers})]
model = torch.nn.Sequential(*layers).to({device!r})
optimizer = torch.optim.AdamW(model.parameters())
batch = torch.randn({batch}, {width}, device={device!r})

def train():
    optimizer.zero_grad()
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    loss.item()

for _ in range(5):
    train()
steps = range({steps})
if {name!r}:
    state = dict(model=model, optimizer=optimizer, rng="all")
    ckpt = mlinfra_sdk.checkpoint({name!r}, keep=mlinfra_sdk.Keep(last=1))
    steps = ckpt.loop(steps, state=state, every="{every}s")
began = time.perf_counter()
for step in steps:
    train()
    last = time.perf_counter()
rate = (step + 1) / (last - began)
size = sum(it.numel() * it.element_size() for it in model.parameters()) * 3
del layers, model, optimizer, batch, train
"""


def main() -> list[Figure]:
    """All figures."""
    with tempfile.TemporaryDirectory(prefix="mlinfra-bench-") as folder:
        os.environ["MLINFRA_HOME"] = str(Path(folder, "home"))
        work = Path(folder, "work")
        work.mkdir()
        os.chdir(work)
        cores = sorted(os.sched_getaffinity(0))
        figures = []
        if len(cores) > 1:
            os.sched_setaffinity(0, cores[:1])  # also for the machine, which is started from here
            with _session() as session:
                _confine(cores[1:])
                figures.append(_cost(session, 1, "the machine's one core; the client has another"))
            _confine(cores)
        with _session() as session:
            if len(cores) > 1:
                figures.append(_cost(session, 1, f"1 of {len(cores)} cores, shared with a client"))
            said = f"{len(cores)} of {len(cores)} cores, shared with a client"
            figures.append(_cost(session, len(cores), said))
        return figures


def gpu() -> Figure:
    """The figure of a training on the GPU, with the processor's other cores free."""
    with _session("any") as session:
        where = f"a GPU and {os.cpu_count()} cores, shared with a client"
        return _cost(session, 1, where, "cuda", rounds=4)


@contextlib.contextmanager
def _session(gpu: str | None = None) -> Iterator[Session]:
    """With a machine that has trained already."""
    with Session(namespace={}, gpu=gpu, isolate=True, env="none") as session:
        _rate(session, 1, 10)
        yield session


def _confine(cores: list[int]) -> None:
    """Where all threads of this process run."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


def _cost(
    session: Session, threads: int, where: str, device: str = "cpu", rounds: int = ROUNDS
) -> Figure:
    steps = max(10, int(SECONDS * _rate(session, threads, 20, device=device)))
    rates: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds):
        for saves in (False, True) if number % 2 else (True, False):
            name = f"{len(where)}-{threads}-{number}" if saves else ""
            rates[saves].append(_rate(session, threads, steps, name, device))
        say(f"{where}: {rates[False][-1]:.3g} and {rates[True][-1]:.3g} steps/s")
    plain, ours = median(rates[False]), median(rates[True])
    ratios = sorted(b / a for a, b in zip(rates[False], rates[True], strict=True))
    size = session.namespace["size"] / 1e6
    return Figure(
        f"training with {where}, {size:.0f} MB saved every {EVERY_S} s",
        ours,
        "steps/s",
        {"no checkpoints": plain},
        f">= {GOAL}",
        median(ratios) >= GOAL,
        f"{rounds} pairs of runs of {SECONDS} s: median {median(ratios):.2f}, "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
    )


def _rate(session: Session, threads: int, steps: int, name: str = "", device: str = "cpu") -> float:
    """Steps per second of one training; its checkpoints are all here when this returns."""
    code = TRAIN.format(
        threads=threads, width=WIDTH, layers=LAYERS, steps=steps, every=EVERY_S, name=name,
        device=device, batch=BATCH[device],
    )  # fmt: skip
    session.run(code)
    end = time.monotonic() + PATIENCE_S
    while name and [it.step for it in CheckpointStore.default().history(name)] != [steps]:
        if time.monotonic() > end:
            raise TimeoutError(f"The last checkpoint of {name} has not come here.")
        time.sleep(0.1)
    return float(session.namespace["rate"])
