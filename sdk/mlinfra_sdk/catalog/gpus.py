"""The value of ``gpu=``: ``A10``, ``A10:2``, ``A10|L4|T4``, ``24GB``, ``any``, ``none``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import msgspec

from mlinfra_sdk import units

from .accelerators import Device, catalog

ANY = "any"
_TERM = re.compile(r"(?P<what>[A-Za-z0-9][A-Za-z0-9 ._-]*)(?::(?P<count>[1-9][0-9]{0,3}))?")
_TOLERANCE = 0.95
"""A driver may keep some of the memory for itself."""


class Gpu(msgspec.Struct, frozen=True):
    """Accelerators of one kind: a canonical name of the catalog, or ``any`` with at least
    ``memory`` bytes on each; and how many of them."""

    name: str
    count: int = 1
    memory: int = 0

    def __str__(self) -> str:
        what = self.name
        if what == ANY and self.memory:
            what = units.format_size(self.memory).replace(" ", "")
        return what if self.count == 1 else f"{what}:{self.count}"

    def met_by(self, offered: Gpu) -> bool:
        """Whether this wish is certainly met by what a provider calls ``offered``."""
        if offered.count != self.count:
            return False
        known = catalog()
        if self.name != ANY:
            parts = known.parts_of(offered.name)
            return bool(parts) and parts <= known.parts_of(self.name)
        return (offered.memory or known.memory(offered.name)) >= self.memory

    def found_in(self, devices: Sequence[Device]) -> list[Device]:
        """Those of a machine's devices that meet this wish, if there are enough; else none."""
        known = catalog()
        parts = known.parts_of(self.name)
        fitting = [
            device
            for device in devices
            if (self.name == ANY or known.part_of_device(device) in parts)
            and device.memory >= self.memory * _TOLERANCE
        ]
        return fitting if len(fitting) >= self.count else []


class Gpus(msgspec.Struct, frozen=True):
    """What a user accepts, the most wanted first."""

    alternatives: tuple[Gpu, ...]

    def __str__(self) -> str:
        return "|".join(map(str, self.alternatives))

    def rank(self, offered: Gpu) -> int | None:
        """Which of the alternatives an offer meets, 0 for the first; None: it meets none."""
        for place, wish in enumerate(self.alternatives):
            if wish.met_by(offered):
                return place
        return None

    def found_in(self, devices: Sequence[Device]) -> Gpu | None:
        """What of it a machine with these devices has; named as precisely as it is known."""
        for wish in self.alternatives:
            fitting = wish.found_in(devices)
            if fitting:
                label = catalog().label(fitting[0])
                return Gpu(label, wish.count, fitting[0].memory if wish.name == ANY else 0)
        return None


def parse_gpus(text: str) -> Gpus | None:
    """The value of ``gpu=``; None for ``none``. ValueError, with a proposal if there is one."""
    if text.lower() == "none":
        return None
    wishes = tuple(_parse_one(term.strip()) for term in text.split("|"))
    if len(set(wishes)) < len(wishes):
        raise ValueError(" An alternative is given twice.")
    return Gpus(wishes)


def _parse_one(term: str) -> Gpu:
    match = _TERM.fullmatch(term)
    if match is None:
        raise ValueError("")
    what, count = match["what"].strip(), int(match["count"] or 1)
    if what.lower() == ANY:
        return Gpu(ANY, count)
    name = catalog().canonical(what)
    if name is not None:
        return Gpu(name, count)
    try:
        memory = units.parse_size(what)
    except ValueError:
        raise ValueError(catalog().nearest(what)) from None
    if not memory:
        raise ValueError("")
    return Gpu(ANY, count, memory)


def describe_devices(devices: Sequence[Device]) -> str:
    """``A10:2, T4`` for what a machine has."""
    counted = Counter(catalog().label(device) for device in devices)
    return ", ".join(name if n == 1 else f"{name}:{n}" for name, n in counted.items())
