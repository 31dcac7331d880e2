"""What accelerators there are, and what they cost: data files with source and date, and the
``gpu=`` grammar over their names."""

from __future__ import annotations

from .accelerators import Accelerator, Catalog, Device, catalog
from .gpus import Gpu, Gpus, describe_devices, parse_gpus
from .prices import Rate, current_rates, is_stale, rates_for

__all__ = [
    "Accelerator",
    "Catalog",
    "Device",
    "Gpu",
    "Gpus",
    "Rate",
    "catalog",
    "current_rates",
    "describe_devices",
    "is_stale",
    "parse_gpus",
    "rates_for",
]
