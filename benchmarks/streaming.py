"""What checkpoints cost a training while it goes on: `python -m benchmarks streaming`.

The same training in remote cells, in turns: without checkpoints, and in ``ckpt.loop``, whose
checkpoints are copied, hashed, written there, sent here and written here while the training goes
on. Once with one thread, so that a core is free, as it is where a GPU trains; once with all cores.
Client and machine are this computer, so its cores pay for both.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Figure, median, say
from mlinfra_sdk.checkpoints.store import CheckpointStore
from mlinfra_sdk.session import Session

ROUNDS = 5
WIDTH, LAYERS = 2000, 4
EVERY_S = 15
SECONDS = 45
GOAL = 0.97
PATIENCE_S = 120

TRAIN = """
import time, torch, mlinfra_sdk
torch.set_num_threads({threads})
torch.manual_seed(0)
model = torch.nn.Sequential(*[torch.nn.Linear({width}, {width}) for _ in range({layers})])
optimizer = torch.optim.AdamW(model.parameters())
batch = torch.randn(64, {width})

def train():
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()

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
del model, optimizer, batch, train
"""


def main() -> list[Figure]:
    """All figures."""
    with tempfile.TemporaryDirectory(prefix="mlinfra-bench-") as folder:
        os.environ["MLINFRA_HOME"] = str(Path(folder, "home"))
        os.chdir(folder)
        with Session(namespace={}, isolate=True, env="none") as session:
            cores = os.cpu_count() or 1
            return [_cost(session, threads) for threads in sorted({1, cores})]


def _cost(session: Session, threads: int) -> Figure:
    steps = max(10, int(SECONDS * _rate(session, threads, 20)))
    rates: dict[bool, list[float]] = {False: [], True: []}
    for number in range(ROUNDS):
        for saves in (False, True) if number % 2 else (True, False):
            name = f"t{threads}-{number}" if saves else ""
            rates[saves].append(_rate(session, threads, steps, name))
        say(f"{threads} threads: {rates[False][-1]:.3g} and {rates[True][-1]:.3g} steps/s")
    plain, ours = median(rates[False]), median(rates[True])
    ratios = sorted(b / a for a, b in zip(rates[False], rates[True], strict=True))
    size = session.namespace["size"] / 1e6
    return Figure(
        f"training with {threads} of {os.cpu_count()} cores, {size:.0f} MB saved every {EVERY_S} s",
        ours,
        "steps/s",
        {"no checkpoints": plain},
        f">= {GOAL}",
        ours >= GOAL * plain,
        f"medians of {ROUNDS} runs of {SECONDS} s; pairs {ratios[0]:.2f} to {ratios[-1]:.2f}",
    )


def _rate(session: Session, threads: int, steps: int, name: str = "") -> float:
    """Steps per second of one training; its checkpoints are all here when this returns."""
    code = TRAIN.format(
        threads=threads, width=WIDTH, layers=LAYERS, steps=steps, every=EVERY_S, name=name
    )
    session.run(code)
    end = time.monotonic() + PATIENCE_S
    while name and [it.step for it in CheckpointStore.default().history(name)] != [steps]:
        if time.monotonic() > end:
            raise TimeoutError(f"The last checkpoint of {name} has not come here.")
        time.sleep(0.1)
    return float(session.namespace["rate"])
