"""A real ipykernel that runs cells and is timed from outside, and figures beside their peers."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.manager import KernelManager

LIMIT_SECONDS = 180
CARD = "application/vnd.mlinfra.run+json"
PACKAGES = ("mlinfra-sdk", "ipykernel", "ipyparallel", "jupyter_client", "pyzmq", "numpy", "blake3")

LOAD = "%load_ext jupyter_mlinfra"
START_PEER = """\
import ipyparallel
_cluster = ipyparallel.Cluster(n=1, log_level=30)
_view = _cluster.start_and_connect_sync(activate=True)[:]
"""
STOP_PEER = "_cluster.stop_cluster_sync()"


@dataclass
class Figure:
    """One measurement. ``peers`` are measured in the same run, in the same unit; the ratio is to
    the first of them. ``note`` says how it was taken, or what bounds it."""

    what: str
    ours: float
    unit: str
    peers: dict[str, float] = field(default_factory=dict)
    goal: str = ""
    met: bool | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours to the first peer's."""
        first = next(iter(self.peers.values()), 0.0)
        return self.ours / first if first else None


@dataclass
class Ran:
    """A cell that has run: seconds from its request to its reply and the idle status after it, and
    to its first stream output; how much text it showed; what its run card told in the end."""

    seconds: float
    first_output: float
    characters: int
    card: dict[str, Any]


class Kernel:
    """An ipykernel process with a state directory of its own."""

    def __init__(self, home: Path) -> None:
        env = {
            **os.environ,
            "MLINFRA_HOME": str(home / "mlinfra"),
            "IPYTHONDIR": str(home / "ipython"),
        }
        self.home = home
        self._manager = KernelManager(kernel_name="python3")
        self._manager.start_kernel(
            env=env, cwd=str(home), extra_arguments=["--IPKernelApp.log_level=40"]
        )
        self._client = self._manager.blocking_client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=60)
        self.pid: int = self._manager.provisioner.pid  # type: ignore[union-attr]

    def run(self, code: str) -> Ran:
        """Run a cell to its end. An error in it ends the benchmark."""
        session, iopub = self._client.session, self._client.iopub_channel.socket
        first, characters, card = 0.0, 0, {}
        start = time.perf_counter()
        request = self._client.execute(code)
        while True:
            if not iopub.poll(LIMIT_SECONDS * 1000):
                raise TimeoutError(f"Nothing came for {LIMIT_SECONDS} s from:\n{code}")
            _, message = session.recv(iopub, mode=0)
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                break
            if kind == "stream":
                first = first or time.perf_counter() - start
                characters += len(content["text"])
            elif kind == "error":
                raise RuntimeError("\n".join(content["traceback"]))
            elif CARD in content.get("data", {}):
                card = content["data"][CARD]
            elif "data" in content:  # as ipyparallel shows what an engine printed
                characters += len(content["data"].get("text/plain", ""))
        self._client.get_shell_msg(timeout=LIMIT_SECONDS)
        return Ran(time.perf_counter() - start, first, characters, card)

    def peak_memory(self) -> float:
        """Peak resident memory of the kernel's process since :meth:`reset_peak`, in bytes."""
        return peak_memory(self.pid)

    def memory(self) -> float:
        """Resident memory of the kernel's process now, in bytes."""
        return float(psutil.Process(self.pid).memory_info().rss)

    def reset_peak(self) -> None:
        """Begin to look for a new peak."""
        reset_peak(self.pid)

    def close(self) -> None:
        """End the kernel; its machines end with it."""
        self._client.stop_channels()
        self._manager.shutdown_kernel()


def peak_memory(pid: int) -> float:
    """Peak resident memory of a process since :func:`reset_peak`, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def reset_peak(pid: int) -> None:
    """Begin to look for a new peak of a process."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


@contextmanager
def kernel() -> Iterator[Kernel]:
    """A fresh kernel in a temporary directory."""
    home = Path(tempfile.mkdtemp(prefix="mlinfra-bench-"))
    it = Kernel(home)
    try:
        yield it
    finally:
        it.close()
        shutil.rmtree(home, ignore_errors=True)


def stored_bytes(folder: Path) -> int:
    """Bytes of all chunks in the stores under a directory."""
    total = 0
    for path in folder.rglob("chunks/*/*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def median(values: Iterable[float]) -> float:
    """The middle of several measurements."""
    return statistics.median(values)


def p95(values: list[float]) -> float:
    """The value that 95 % do not exceed."""
    return statistics.quantiles(values, n=20)[-1]


def machine() -> dict[str, str]:
    """Where the measurements were taken."""
    model = platform.processor() or platform.machine()
    with suppress(OSError, IndexError):
        text = Path("/proc/cpuinfo").read_text()
        model = text.split("model name")[1].split(":")[1].split("\n")[0].strip()
    versions = []
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    return {
        "CPU": f"{model}, {os.cpu_count()} cores",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "versions": ", ".join(versions),
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
