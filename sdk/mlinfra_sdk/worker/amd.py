"""AMD's GPUs by ``amdsmi``, where ROCm is: nothing of it is installed or imported elsewhere."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlinfra_sdk.worker.run_usage import GpuReading

logger = logging.getLogger(__name__)

_KFD = Path("/dev/kfd")
"""The device of ROCm's driver."""
_MB = 1 << 20


def read() -> list[GpuReading]:
    """A reading of each; none without ROCm's driver and its Python package."""
    library = _library()
    return [] if library is None else [_read(library, handle) for handle in _handles(library)]


@functools.cache
def _library() -> Any:
    """The package, initialized; it is in the environment, or where ROCm installs it."""
    rocm = Path(os.environ.get("ROCM_PATH", "/opt/rocm"))
    if not _KFD.exists() and "ROCM_PATH" not in os.environ:
        return None  # where the library is missing, the package ends the process
    if not (rocm / "lib" / "libamd_smi.so").exists():
        return None
    shipped = str(rocm / "share" / "amd_smi")
    try:
        sys.path.append(shipped)
        library = importlib.import_module("amdsmi")
        library.amdsmi_init()
    except (Exception, SystemExit):
        logger.info("AMD's GPUs are not read", exc_info=True)
        return None
    finally:
        sys.path.remove(shipped)
    return library


def _handles(library: Any) -> list[Any]:
    with suppress(library.AmdSmiException):
        return list(library.amdsmi_get_processor_handles())
    return []


def _read(library: Any, handle: Any) -> GpuReading:
    def asked(call: Callable[..., Any], *arguments: Any) -> Any:
        with suppress(library.AmdSmiException):
            return call(handle, *arguments)
        return {}

    reading = GpuReading(asked(library.amdsmi_get_gpu_asic_info).get("market_name") or "AMD GPU")
    memory = asked(library.amdsmi_get_gpu_vram_usage)
    if memory:
        reading.used, reading.total = memory["vram_used"] * _MB, memory["vram_total"] * _MB
    activity = asked(library.amdsmi_get_gpu_activity)
    reading.busy = _number(activity.get("gfx_activity"))
    reading.memory_busy = _number(activity.get("umc_activity"))
    power = asked(library.amdsmi_get_power_info)
    reading.watts = _number(power.get("current_socket_power")) or _number(
        power.get("average_socket_power")
    )
    kinds = library.AmdSmiTemperatureType
    for kind in (kinds.HOTSPOT, kinds.EDGE):
        found = asked(library.amdsmi_get_temp_metric, kind, library.AmdSmiTemperatureMetric.CURRENT)
        if found:
            reading.celsius = float(found)
            break
    return reading


def _number(value: object) -> float | None:
    """What it does not tell is "N/A"."""
    return float(value) if isinstance(value, int) else None
