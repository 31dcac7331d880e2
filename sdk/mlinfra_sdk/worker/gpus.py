"""Which NVIDIA GPUs this machine has, and whether they are those that were asked for."""

from __future__ import annotations

import msgspec

from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.spec import Gpu


class Found(msgspec.Struct, frozen=True):
    """A GPU as NVML gives it: its name, and its memory in bytes."""

    name: str
    memory: int


def present() -> list[Found]:
    """The GPUs that this process may use; none where there is no NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        return [
            Found(
                str(pynvml.nvmlDeviceGetName(handle)),
                int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
            )
            for handle in handles
        ]
    finally:
        pynvml.nvmlShutdown()


def require(gpu: Gpu, where: str) -> None:
    """Raise :class:`RequestError` unless this machine, which is ``on=where``, has the GPU."""
    wanted = gpu.name.upper()
    found = present()
    # NVML says "NVIDIA A100-SXM4-80GB"; a user writes A100.
    fitting = [it for it in found if wanted in it.name.upper().replace("-", " ").split()]
    if len(fitting) >= gpu.count:
        return
    have = ", ".join(it.name for it in found) or "no NVIDIA GPU"
    raise RequestError(
        f"gpu={gpu} cannot be met by on={where}: this machine has {have}.",
        hint="Leave gpu= out to run on this machine's CPU, or name a target that has the GPU.",
    )
