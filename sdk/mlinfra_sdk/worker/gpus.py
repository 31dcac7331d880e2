"""Which NVIDIA GPUs this machine has and may use, and whether they are what was asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence

from mlinfra_sdk.catalog import Device, Gpu, Gpus, describe_devices
from mlinfra_sdk.errors import RequestError


def present() -> list[Device]:
    """The devices as the driver (NVML) names them, those that ``CUDA_VISIBLE_DEVICES`` hides left
    out; none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        chosen = _visible(
            os.environ.get("CUDA_VISIBLE_DEVICES"),
            [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles],
        )
        return [
            Device(
                str(pynvml.nvmlDeviceGetName(handles[index])),
                int(pynvml.nvmlDeviceGetMemoryInfo(handles[index]).total),
            )
            for index in chosen
        ]
    except pynvml.NVMLError:  # a device that the driver has lost
        return []
    finally:
        pynvml.nvmlShutdown()


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
