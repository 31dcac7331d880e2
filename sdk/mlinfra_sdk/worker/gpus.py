"""Which NVIDIA GPUs this machine has and may use, and whether they are what was asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from mlinfra_sdk.catalog import Device, Gpu, Gpus, describe_devices
from mlinfra_sdk.errors import RequestError

_COMMAND_SECONDS = 15.0


def present() -> list[Device]:
    """The devices as the driver names them, those that ``CUDA_VISIBLE_DEVICES`` hides left out;
    none without a driver."""
    found = _by_library()
    if found is None:
        found = _by_command()
    chosen = _visible(os.environ.get("CUDA_VISIBLE_DEVICES"), [uuid for uuid, _ in found])
    return [found[index][1] for index in chosen]


_opened = False


def handles() -> list[object]:
    """NVML's handles of the devices that this process may use; none without a driver. NVML stays
    open: to open it wakes a GPU up, which takes up to seconds."""
    global _opened
    import pynvml

    try:
        if not _opened:
            pynvml.nvmlInit()
            _opened = True
        found = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in found]
    except pynvml.NVMLError:
        return []
    chosen = _visible(os.environ.get("CUDA_VISIBLE_DEVICES"), uuids)
    return [found[index] for index in chosen]


def _by_library() -> list[tuple[str, Device]] | None:
    """(UUID, device) of all, by NVML; None if that cannot be loaded."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return [
            (
                str(pynvml.nvmlDeviceGetUUID(handle)),
                Device(
                    str(pynvml.nvmlDeviceGetName(handle)),
                    int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                ),
            )
            for handle in map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        ]
    except pynvml.NVMLError:  # a device that the driver has lost
        return []
    finally:
        pynvml.nvmlShutdown()


def _by_command() -> list[tuple[str, Device]]:
    """The same by ``nvidia-smi``, which some containers have while the library is not where
    programs look for it."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = ["--query-gpu=uuid,memory.total,name", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [command, *query], capture_output=True, text=True, timeout=_COMMAND_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = []
    for line in done.stdout.splitlines():
        uuid, memory, name = (word.strip() for word in [*line.split(",", 2), "", ""][:3])
        if memory.isdigit():
            found.append((uuid, Device(name, int(memory) << 20)))
    return found


def _visible(setting: str | None, uuids: Sequence[str]) -> list[int]:
    """Indices of the devices that CUDA would use: those listed, up to the first that is unknown.
    Entries are indices or the beginnings of UUIDs."""
    if setting is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for entry in setting.split(","):
        word = entry.strip()
        if word.isdigit():
            found = [int(word)] if int(word) < len(uuids) else []
        else:
            found = [i for i, uuid in enumerate(uuids) if word and uuid.startswith(word)]
        if len(found) != 1 or found[0] in chosen:
            break
        chosen += found
    return chosen


def require(wanted: Gpus, where: str) -> Gpu:
    """What this machine, which is ``on=where``, has of what is wanted; raises
    :class:`RequestError` if that is nothing."""
    devices = present()
    found = wanted.found_in(devices)
    if found is not None:
        return found
    have = describe_devices(devices) or "no NVIDIA GPU"
    raise RequestError(
        f"gpu={wanted} cannot be met by on={where}: this machine has {have}.",
        hint="Leave gpu= out to run on this machine's CPU, or name a target that has the GPU.",
    )
