"""What a machine does: one reading of its processors, memory, disk, network and GPUs."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil

from mlinfra_sdk.worker import amd, gpus
from mlinfra_sdk.worker.run_usage import GpuReading, Reading


class Probe:
    """Reads the processes of one kernel; the first reading begins the measure of the second.

    Sources: ``/proc`` by psutil, NVML by nvidia-ml-py (nvmlDeviceGetUtilizationRates: percent of
    the past sample period, a sixth of a second to a second by the product).
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._before = (time.monotonic(), 0.0, _Moved.now())
        self._here = _busy_here()
        self._known: dict[int, psutil.Process] = {}

    def read(self) -> Reading | None:
        """What was done since the reading before; None if the kernel is gone."""
        try:
            root = self._process(self._pid)
            tree = [root, *root.children(recursive=True)]
        except psutil.Error:
            return None
        there = {process.pid for process in tree}
        self._known = {pid: known for pid, known in self._known.items() if pid in there}
        busy, memory = 0.0, 0
        for process in tree:
            with suppress(psutil.Error):  # it may end at any moment
                process = self._process(process.pid)
                with process.oneshot():
                    times = process.cpu_times()
                    memory += process.memory_info().rss
                busy += times.user + times.system + times.children_user + times.children_system
        now, moved = time.monotonic(), _Moved.now()
        began, busy_before, moved_before = self._before
        self._before = now, busy, moved
        seconds = max(now - began, 1e-6)
        busy_before = busy_before or busy  # at the first: what was before is not of this time
        read, written, received, sent = (
            (after - before) / seconds for after, before in zip(moved, moved_before, strict=True)
        )
        cores = max(0.0, busy - busy_before) / seconds
        here, here_before = _busy_here(), self._here
        self._here = here
        others = (here - here_before) / seconds - cores
        return Reading(
            time.time(),
            seconds,
            cores,
            memory,
            max(0.0, others),
            read,
            written,
            received,
            sent,
            read_gpus(),
        )

    def _process(self, pid: int) -> psutil.Process:
        process = self._known.get(pid)
        if process is None or not process.is_running():
            process = self._known[pid] = psutil.Process(pid)
        return process


def _busy_here() -> float:
    """Seconds that the processors of the whole machine have worked."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # in user, too
    return float(sum(times) - idle - guest)


class _Moved(tuple[float, float, float, float]):
    """Bytes read, written, received and sent by the machine since it was started."""

    @classmethod
    def now(cls) -> _Moved:
        disk = net = None
        with suppress(OSError, RuntimeError):  # containers may hide them
            disk, net = psutil.disk_io_counters(), psutil.net_io_counters()
        return cls(
            (
                disk.read_bytes if disk else 0,
                disk.write_bytes if disk else 0,
                net.bytes_recv if net else 0,
                net.bytes_sent if net else 0,
            )
        )


def read_gpus() -> list[GpuReading]:
    """Of the GPUs that this process may use; none without a driver's library."""
    import pynvml

    found = amd.read()
    for handle in gpus.handles():
        with suppress(pynvml.NVMLError):
            found.append(_read_gpu(handle))
    return found


def _read_gpu(handle: object) -> GpuReading:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    reading = GpuReading(
        str(pynvml.nvmlDeviceGetName(handle)), used=int(memory.used), total=int(memory.total)
    )
    with suppress(pynvml.NVMLError):
        rates = pynvml.nvmlDeviceGetUtilizationRates(handle)
        reading.busy, reading.memory_busy = float(rates.gpu), float(rates.memory)
    with suppress(pynvml.NVMLError):
        reading.watts = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    with suppress(pynvml.NVMLError):
        reading.celsius = float(
            pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        )
    return reading


def cores_here() -> int:
    """Cores that processes of this machine may use: of its affinity, or a container's quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            return max(1, min(cores, round(int(quota) / int(period))))
    return cores
