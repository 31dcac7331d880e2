"""How much of the machine is in use at an instant: processor, memory, GPUs."""

from __future__ import annotations

import msgspec


class GpuUsage(msgspec.Struct, frozen=True):
    """One NVIDIA GPU: ``busy`` in percent of the last sampling period, memory in bytes."""

    busy: int
    used: int
    total: int


class Usage(msgspec.Struct, frozen=True):
    """``cpu`` in percent of all cores since the call before, memory in bytes."""

    cpu: float
    used: int
    total: int
    gpus: list[GpuUsage] = []


def usage() -> Usage:
    """Of the whole machine, right now; GPUs are those that its programs may use."""
    import psutil  # who only reads what others measured needs neither this nor NVML

    from mlinfra_sdk.worker.readings import read_gpus

    memory = psutil.virtual_memory()
    gpus = [GpuUsage(round(gpu.busy or 0), gpu.used, gpu.total) for gpu in read_gpus()]
    return Usage(psutil.cpu_percent(None), memory.total - memory.available, memory.total, gpus)
