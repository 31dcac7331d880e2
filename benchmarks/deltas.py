"""What changes cost on the link, and what transfers cost in memory: `python -m benchmarks deltas`.

A worker that shares nothing (``isolate``). Each object has about MIB mebibytes; it is sent, sent
again unchanged, and sent with a part of it changed. The bytes are those that the run card tells.
Memory is what client, agent and remote kernel need at most beyond what they had before; the object
itself is in the client already, and once in the kernel.
"""

from __future__ import annotations

import os

import psutil

from benchmarks.harness import LOAD, Figure, Kernel, Ran, kernel, peak_memory, reset_peak, say

MIB = int(os.environ.get("MLINFRA_BENCH_MIB", "1024"))
MAGIC = "%%remote isolate=yes"
ALLOWED_MB = 200

PREPARE = f"""\
import numpy as np, pandas as pd
n = {MIB} << 20
rng = np.random.default_rng(1)
"""
OBJECTS = {
    "ndarray": ("x = rng.random(n // 8)", "x[: len(x) // 100] += 1"),
    "DataFrame of 16 columns, one changed": (
        "x = pd.DataFrame({f'c{i}': rng.random(n // 128) for i in range(16)})",
        "x['c3'] = x['c3'] + 1",
    ),
    "dict of 64 arrays, one changed": (
        "x = {f'a{i}': rng.random(n // 512) for i in range(64)}",
        "x['a3'] += 1",
    ),
    "torch module of 64 layers, one changed": (
        "import torch\n"
        "side = int((n / 256) ** 0.5)\n"
        "x = torch.nn.Sequential(*(torch.nn.Linear(side, side) for _ in range(64)))",
        "with torch.no_grad(): x[3].weight += 1",
    ),
    "scikit-learn estimator, a parameter changed": (
        "from sklearn.neighbors import KNeighborsRegressor\n"
        "x = KNeighborsRegressor(algorithm='brute')\n"
        "x.fit(rng.random((n // 72, 8)), rng.random(n // 72))",
        "x.n_neighbors = 7",
    ),
}


def main() -> list[Figure]:
    """All figures of this module."""
    figures = []
    with kernel() as it:
        it.run(LOAD)
        it.run(PREPARE)
        it.run(f"{MAGIC}\nimport numpy, pandas, torch")
        for name, (make, change) in OBJECTS.items():
            say(f"deltas: {name}")
            it.run(make)
            figures += _measure(it, name, change)
            it.run(f"{MAGIC}\ndel x")
    return figures


def _measure(it: Kernel, name: str, change: str) -> list[Figure]:
    code = f"{MAGIC}\ntype(x)"
    processes = {"client": it.pid, **_far(it)}
    before = {}
    for who, pid in processes.items():
        reset_peak(pid)
        before[who] = peak_memory(pid)
    first = _bytes(it.run(code))
    beyond = {who: (peak_memory(pid) - before[who]) / 1e6 for who, pid in processes.items()}
    beyond["kernel"] = max(0.0, beyond["kernel"] - MIB * 1.048576)
    again = _bytes(it.run(code))
    it.run(change)
    share = 100 * _bytes(it.run(code)) / first
    worst = max(beyond.values())
    told = ", ".join(f"{who} {amount:.0f}" for who, amount in beyond.items())
    return [
        Figure(f"{name}: sent again", again / 1e3, "kB", note="unchanged"),
        Figure(f"{name}: sent again with the change", share, "% of it"),
        Figure(
            f"{name}: memory beyond the object",
            worst,
            "MB",
            {},
            f"<= {ALLOWED_MB} MB on either side",
            worst <= ALLOWED_MB,
            told,
        ),
    ]


def _far(it: Kernel) -> dict[str, int]:
    """The agent and its kernel."""
    found = {}
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
            if process.environ().get("MLINFRA_HOME") != str(it.home / "mlinfra"):
                continue
        except psutil.Error:
            continue
        if "mlinfra_sdk.worker.kernel" in line:
            found["kernel"] = process.pid
        elif "mlinfra_sdk.worker" in line:
            found["agent"] = process.pid
    return found


def _bytes(ran: Ran) -> int:
    return int(ran.card["bytes_up"]) + int(ran.card["bytes_down"])
