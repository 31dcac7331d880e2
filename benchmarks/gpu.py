"""A real GPU: `python -m benchmarks gpu` (needs one of NVIDIA's, and torch; not part of all).

Interleaved, in one process and a machine of `local` on the same GPU: steps per second of a
convolutional network and of a transformer block in a remote cell (measured by its monitor and
`track`, as every run is) beside the same function called here; the same on this computer's
processor; 1 GiB of CUDA memory there and back beside copies through ordinary memory; how long a
save of 500 MB and 2 GB of CUDA parameters holds the loop beside ``torch.save`` and
``torch.distributed.checkpoint.async_save``; what checkpoints cost a training on the GPU.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import STATES, holds
from benchmarks.harness import Figure, median, say
from benchmarks.streaming import gpu as streaming

ROUNDS = 5
SECONDS = 3.0


def main() -> list[Figure]:
    """All figures."""
    with tempfile.TemporaryDirectory(prefix="mlinfra-") as folder:
        os.environ["MLINFRA_HOME"] = str(Path(folder, "home"))
        os.chdir(folder)
        figures = trainings()
        figures += tensors()
        for name, count in STATES.items():
            figures += holds(f"{name} of CUDA", count, Path(folder), device="cuda")
        figures.append(streaming())
        return figures


def train(kind: str, device: str, seconds: float) -> tuple[float, float]:
    """Steps per second of a training loop, and its last loss."""
    import time

    import torch

    import mlinfra_sdk

    torch.manual_seed(0)
    if kind == "CNN":
        model: Any = torch.nn.Sequential(
            torch.nn.Conv2d(3, 64, 3, padding=1), torch.nn.ReLU(),
            torch.nn.Conv2d(64, 128, 3, 2, padding=1), torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(128, 10),
        )  # fmt: skip
        x = torch.randn(128, 3, 32, 32, device=device)
    else:
        model = torch.nn.Sequential(
            torch.nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True),
            torch.nn.Flatten(), torch.nn.Linear(512 * 128, 10),
        )  # fmt: skip
        x = torch.randn(16, 128, 512, device=device)
    y = torch.randint(10, (x.shape[0],), device=device)
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    steps, loss = 0, 0.0
    began = warm = time.perf_counter()
    ticks = iter(lambda: time.perf_counter() < began + seconds, False)
    for _ in mlinfra_sdk.track(ticks, samples=x.shape[0]):
        found = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        loss = found.item()
        steps += 1
        if steps == 3:
            warm = time.perf_counter()
    return (steps - 3) / (time.perf_counter() - warm), loss


def trainings() -> list[Figure]:
    """Rates in a cell beside rates here."""
    from mlinfra_sdk import Session

    figures = []
    with Session(namespace={}, gpu="any") as session:
        for kind in ("CNN", "transformer block"):
            there: list[float] = []
            here: list[float] = []
            for number in range(ROUNDS + 1):
                there.append(session.call(train, kind, "cuda", SECONDS)[0])
                here.append(train(kind, "cuda", SECONDS)[0])
                say(f"{kind} {number}: {there[-1]:.1f} there, {here[-1]:.1f} here, steps/s")
            ours, peer = median(there[1:]), median(here[1:])
            processor = session.call(train, kind, "cpu", SECONDS)[0]
            figures += [
                Figure(
                    f"{kind} on the GPU, remote cell", ours, "steps/s", {"here": peer},
                    ">= 0.99", ours >= 0.99 * peer, f"median of {ROUNDS}",
                ),
                Figure(
                    f"{kind}: GPU beside processor", ours, "steps/s",
                    {f"processor, {os.cpu_count()} cores": processor}, note="one run of the latter",
                ),
                predicted(kind, ours / processor),
            ]  # fmt: skip
    return figures


def predicted(kind: str, measured: float) -> Figure:
    """The speed-up that is guessed from figures alone, of a cell that ran on the processor only."""
    from mlinfra_sdk.catalog import catalog
    from mlinfra_sdk.predict import Used, calibrate
    from mlinfra_sdk.predict.hardware import guess
    from mlinfra_sdk.worker import gpus

    name = catalog().label(gpus.present()[0])
    found = guess(Used(1.0, 1.0), "", name, None, calibrate())
    assert found is not None
    low, middle, high = (
        math.exp(-found.mean + sign * 1.2816 * found.deviation) for sign in (-1, 0, 1)
    )
    within = "within" if low <= measured <= high else "not within"
    return Figure(
        f"{kind}: speed-up guessed from figures", middle, "x", {"measured": measured},
        note=f"{within} its interval of 80 %, {low:.1f} to {high:.0f}",
    )  # fmt: skip


def tensors() -> list[Figure]:
    """1 GiB of CUDA memory there and back."""
    import torch

    from mlinfra_sdk import Session

    namespace: dict[str, Any] = {"big": torch.empty(1 << 28, device="cuda")}
    times: dict[str, list[float]] = {name: [] for name in ("there", "back", "copy", "same")}
    with Session(namespace=namespace, gpu="any") as session:
        session.run("import torch; total = 0.0")
        for number in range(ROUNDS):
            big = namespace["big"]
            big.normal_()
            torch.cuda.synchronize()
            began = time.perf_counter()
            copied = big.cpu().clone().cuda()
            torch.cuda.synchronize()
            times["copy"].append(time.perf_counter() - began)
            del copied
            for name in ("there", "same"):
                began = time.perf_counter()
                session.run("total = float(big[::1024].sum())")
                times[name].append(time.perf_counter() - began)
            session.run("made = big + 1; torch.cuda.synchronize()")
            began = time.perf_counter()
            made = session.pull("made")
            float(made[::1024].sum())
            times["back"].append(time.perf_counter() - began)
            say(f"1 GiB, round {number}: " + str({k: round(v[-1], 3) for k, v in times.items()}))
    peer = {"to memory, copied, to the GPU": median(times["copy"][1:])}
    return [
        Figure(f"1 GiB of CUDA memory {what}", median(times[name][1:]), "s", peer)
        for name, what in (("there", "there"), ("same", "again, unchanged"), ("back", "back"))
    ]
