"""Whether this machine's GPUs work, also for what no cell waits for: a thread of the user's, a
process that a cell has left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable

import anyio
import anyio.to_thread
import psutil

THRESHOLD = 2
"""Percent of its time that a GPU must be busy for that to count as work."""
_LONGEST_PAUSE = 5.0
_COMMAND_SECONDS = 15.0


async def watch(idle: Callable[[], float], worked: Callable[[], None]) -> None:
    """Call ``worked`` every few seconds in which a GPU works. Looks only while nothing else is
    known to work (``idle()`` seconds), and ends at once without a driver."""
    look = await anyio.to_thread.run_sync(_opened)
    if look is None:
        return
    while True:
        await anyio.sleep(_LONGEST_PAUSE if idle() > _LONGEST_PAUSE else 0.5)
        if idle() and await anyio.to_thread.run_sync(look):
            worked()


def _opened() -> Callable[[], bool] | None:
    """What looks at the GPUs: the driver's library, or its command; None without any."""
    import pynvml

    try:
        # It stays open: to open it wakes a GPU up, which takes up to seconds.
        pynvml.nvmlInit()
        return _by_library if pynvml.nvmlDeviceGetCount() else None
    except pynvml.NVMLError:
        return _by_command if shutil.which("nvidia-smi") else None


def _by_library() -> bool:
    import pynvml

    try:
        devices = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
    except pynvml.NVMLError:
        return False
    return any(_works(device) for device in devices)


def _works(device: object) -> bool:
    """A device whose driver does not tell (a slice of a divided one) counts as still: a process
    that only holds memory would keep the machine for good."""
    import pynvml

    try:
        if pynvml.nvmlDeviceGetUtilizationRates(device).gpu < THRESHOLD:
            return False
    except pynvml.NVMLError:
        return False
    try:
        there = pynvml.nvmlDeviceGetComputeRunningProcesses(device)
    except pynvml.NVMLError:
        there = []
    # In a container the driver tells no processes, or the host's numbers for them: all of it is
    # taken for ours but what surely belongs to other users of a host.
    return not there or not all(_of_another_user(int(it.pid)) for it in there)


def _of_another_user(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).uids().real != os.getuid())
    except psutil.Error:
        return False


def _by_command() -> bool:
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_COMMAND_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return any(
        line.strip().isdigit() and int(line) >= THRESHOLD for line in done.stdout.splitlines()
    )
