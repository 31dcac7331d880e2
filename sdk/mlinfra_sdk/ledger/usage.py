"""What a run has used, as figures of the ledger."""

from __future__ import annotations

from mlinfra_sdk.ledger.records import Measurement
from mlinfra_sdk.worker.run_usage import RunUsage

_PROC = "/proc of the machine, each second"
_NVML = "NVML of the machine, each second"

_FIGURES = (
    ("cores", "cores_mean", "cores", _PROC),
    ("cores_peak", "cores_peak", "cores", _PROC),
    ("cores_here", "cores_here", "cores", _PROC),
    ("memory_peak", "memory_peak", "B", _PROC),
    ("read", "disk_read", "B", _PROC),
    ("written", "disk_written", "B", _PROC),
    ("received", "network_received", "B", _PROC),
    ("sent", "network_sent", "B", _PROC),
    ("gpu_busy", "gpu_utilization", "%", _NVML),
    ("gpu_memory_busy", "gpu_memory_utilization", "%", _NVML),
    ("gpu_memory_peak", "gpu_memory_peak", "B", _NVML),
    ("joules", "gpu_energy", "J", _NVML),
)


def measurements(usage: RunUsage) -> list[Measurement]:
    """Of the machine if it was looked at, and the rate of each kind of loop
    (``rate:UNIT``, units per second after the warm-up)."""
    found = []
    if usage.readings:
        for field, name, unit, source in _FIGURES:
            value = getattr(usage, field)
            if value is None or (source == _NVML and not usage.gpu):
                continue
            found.append(Measurement(name=name, value=float(value), unit=unit, source=source))
    for loop in usage.loops:
        how = f"{loop.source} {loop.label}".strip()
        found.append(
            Measurement(
                name=f"rate:{loop.unit}", value=loop.rate, unit=f"{loop.unit}/s", source=how
            )
        )
    return found
