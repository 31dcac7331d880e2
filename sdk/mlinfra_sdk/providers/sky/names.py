"""SkyPilot's names for accelerators, and the catalog's."""

from __future__ import annotations

from mlinfra_sdk.catalog.gpus import Gpu

_OURS = {
    "T4": "T4",
    "L4": "L4",
    "A10": "A10",
    "A10G": "A10G",
    "A40": "A40",
    "L40": "L40",
    "L40S": "L40S",
    "P100": "P100",
    "V100": "V100-16GB",
    "V100-32GB": "V100-32GB",
    "A100": "A100-40GB",
    "A100-80GB": "A100-80GB",
    "A100-80GB-SXM": "A100-SXM-80GB",
    "H100": "H100",
    "H100-SXM": "H100-SXM",
    "H100-NVL": "H100-NVL",
    "H200": "H200",
    "H200-SXM": "H200",
    "B200": "B200",
    "RTX3090": "RTX-3090",
    "RTX4090": "RTX-4090",
    "RTXA6000": "RTX-A6000",
    "RTX6000-Ada": "RTX-6000-Ada",
    "RTXPRO6000": "RTX-PRO-6000",
    "MI300X": "MI300X",
}
"""As its catalog (v8) writes them. There ``A100`` is the one of 40 GB, ``V100`` of 16 GB."""


def names_for(wish: Gpu) -> dict[str, int]:
    """Accelerators of SkyPilot that meet a wish, with their count."""
    return {sky: wish.count for sky, ours in _OURS.items() if wish.met_by(Gpu(ours, wish.count))}


def gpu_of(name: str, count: int) -> Gpu:
    """What SkyPilot calls so."""
    return Gpu(_OURS.get(name, name), count)
