"""How much of the machine is in use at an instant: processor, memory, GPUs."""

from __future__ import annotations

import functools

import msgspec
import psutil
import pynvml


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
    """Of the whole machine, right now; GPUs are those that the driver tells of."""
    memory = psutil.virtual_memory()
    return Usage(psutil.cpu_percent(None), memory.total - memory.available, memory.total, _gpus())


@functools.cache
def _driver() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True


def _gpus() -> list[GpuUsage]:
    found: list[GpuUsage] = []
    try:
        for index in range(pynvml.nvmlDeviceGetCount()) if _driver() else ():
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            busy = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            found.append(GpuUsage(int(busy), int(memory.used), int(memory.total)))
    except pynvml.NVMLError:  # a device that the driver has lost, or that does not tell
        return []
    return found
