"""Checkpoints of a training loop: `python -m benchmarks checkpoints`.

In one process, interleaved, with states of 500 MB and 2 GB of torch parameters that change between
saves: how long a save holds the loop (median of the saves after the first, which finds no memory to
copy into), beside ``torch.save`` into a file and ``torch.distributed.checkpoint.async_save``, each
of which has finished before the next begins; how long a restore takes, in place; and the bytes of
20 checkpoints of a model of which a tenth is trained, beside plain files.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Figure, say

ROUNDS = 4
SAVES = 20
STATES = {"500 MB": 125_000_000, "2 GB": 500_000_000}
"""Numbers of float32 parameters."""


def main() -> list[Figure]:
    """All figures."""
    with tempfile.TemporaryDirectory(prefix="mlinfra-") as folder:
        os.environ["MLINFRA_HOME"] = str(Path(folder, "home"))
        figures = []
        for name, count in STATES.items():
            figures += holds(name, count, Path(folder))
        figures.append(stored(Path(folder)))
        return figures


def _model(count: int) -> Any:
    import torch

    side = 5000
    layers = [torch.nn.Linear(side, side, bias=False) for _ in range(max(1, count // side**2))]
    return torch.nn.Sequential(*layers)


def holds(name: str, count: int, folder: Path, device: str = "cpu") -> list[Figure]:
    """Hold and restore times of one size."""
    import torch
    import torch.distributed.checkpoint as dcp

    import mlinfra_sdk

    model = _model(count).to(device)
    ckpt = mlinfra_sdk.checkpoint(name.replace(" ", "-"), keep=mlinfra_sdk.Keep(last=1))
    ours, plain, distributed = [], [], []
    for number in range(ROUNDS + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3)
            if device == "cuda":
                torch.cuda.synchronize()
        began = time.perf_counter()
        ckpt.save({"model": model}, step=number)
        ours.append(time.perf_counter() - began)
        ckpt.wait()
        began = time.perf_counter()
        torch.save(model.state_dict(), folder / "plain.pt")
        plain.append(time.perf_counter() - began)
        began = time.perf_counter()
        response = dcp.async_save(model.state_dict(), checkpoint_id=folder / "dcp", no_dist=True)
        distributed.append(time.perf_counter() - began)
        future: Any = getattr(response, "upload_completion", response)
        future.result()
        say(f"{name}: {ours[-1]:.3f} s, {plain[-1]:.3f} s, {distributed[-1]:.3f} s")
    medians = [statistics.median(it[1:]) for it in (ours, plain, distributed)]
    peers = {"torch.save": medians[1], "async_save": medians[2]}
    began = time.perf_counter()
    ckpt.restore({"model": model})
    restore = time.perf_counter() - began
    began = time.perf_counter()
    model.load_state_dict(torch.load(folder / "plain.pt"))
    peer = time.perf_counter() - began
    return [
        Figure(
            f"a save of {name} holds the loop", medians[0], "s", peers,
            "<= 0.5 of the better one", medians[0] <= 0.5 * min(peers.values()),
            f"median of {ROUNDS}; the first one took {ours[0]:.2f} s",
        ),
        Figure(
            f"{name} restored in place", restore, "s", {"torch.load": peer},
            note="files in the page cache; ours looks that each chunk is right",
        ),
    ]  # fmt: skip


def stored(folder: Path) -> Figure:
    """Bytes of successive checkpoints with frozen layers."""
    import torch

    import mlinfra_sdk
    from mlinfra_sdk.checkpoints.store import CheckpointStore

    layers = [torch.nn.Linear(1000, 1000) for _ in range(20)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW([it for layer in layers[-2:] for it in layer.parameters()])
    ckpt = mlinfra_sdk.checkpoint("frozen", keep=mlinfra_sdk.Keep(last=SAVES))
    plain = 0
    for number in range(SAVES):
        model(torch.randn(8, 1000)).square().mean().backward()
        optimizer.step()
        ckpt.save({"model": model, "optimizer": optimizer}, step=number, wait=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, folder / "frozen.pt")
        plain += (folder / "frozen.pt").stat().st_size
    ours = sum(added for _, _, added in CheckpointStore.default().sizes("frozen"))
    return Figure(
        f"{SAVES} checkpoints, 2 of 20 layers trained", ours / 1e6, "MB",
        {"plain files": plain / 1e6}, note="AdamW for the trained ones",
    )  # fmt: skip
