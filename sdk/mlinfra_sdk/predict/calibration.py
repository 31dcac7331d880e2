"""How fast this computer is: measured once in about a second, and kept for a month."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from mlinfra_sdk import paths

_DAYS = 30
_SECONDS = 20.0
"""What the measurement may take at most; it takes one or two."""


class Calibration(msgspec.Struct, frozen=True):
    """``gflops`` of a product of float32 matrices with all cores, None without numpy;
    ``bandwidth`` of copying memory in GB/s (read and written); when, and on what processor."""

    gflops: float | None
    bandwidth: float
    cores: int
    at: float
    processor: str


def calibrate(*, measure: bool = True) -> Calibration | None:
    """This computer's figures. Without ``measure`` only those that are known; None if there are
    none, or the measurement failed. It runs in a process of its own, so numpy is not imported into
    this one."""
    path = paths.data_dir() / "calibration.json"
    with suppress(OSError, msgspec.MsgspecError):
        known = msgspec.json.decode(path.read_bytes(), type=Calibration)
        same = (known.processor, known.cores) == (_processor(), os.cpu_count() or 1)
        if same and 0 <= time.time() - known.at < _DAYS * 86400:
            return known
    if not measure:
        return None
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mlinfra_sdk.predict.calibration"],
            capture_output=True,
            timeout=_SECONDS,
            check=True,
        )
        found = msgspec.json.decode(done.stdout, type=Calibration)
    except (OSError, subprocess.SubprocessError, msgspec.MsgspecError):
        return None
    with suppress(OSError):
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_bytes(msgspec.json.encode(found))
        fresh.chmod(0o600)
        fresh.replace(path)
    return found


def _processor() -> str:
    with suppress(OSError, IndexError):
        text = Path("/proc/cpuinfo").read_text()
        return text.split("model name")[1].split(":")[1].split("\n")[0].strip()
    return platform.processor() or platform.machine()


def _best(work: Callable[[], object], amount: float) -> float:
    """The highest rate of several rounds: what else the computer does only slows down."""
    rates: list[float] = []
    until = time.perf_counter() + 0.4
    while len(rates) < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        work()
        rates.append(amount / (time.perf_counter() - began))
    return max(rates)


def _measured() -> Calibration:
    size = 64 << 20
    source, target = bytearray(size), bytearray(size)

    def copy() -> None:
        target[:] = source

    bandwidth = _best(copy, 2 * size / 1e9)
    gflops = None
    with suppress(ImportError):
        import numpy as np

        side = 1024
        a = np.random.default_rng(0).random((side, side), dtype=np.float32)
        gflops = _best(lambda: a @ a, 2 * side**3 / 1e9)
    return Calibration(gflops, bandwidth, os.cpu_count() or 1, time.time(), _processor())


if __name__ == "__main__":
    sys.stdout.write(msgspec.json.encode(_measured()).decode())
