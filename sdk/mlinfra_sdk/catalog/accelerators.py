"""Accelerators and their names.

A *part* is what a machine can hold, with the figures of its vendor's document; a *group* is a name
for several parts: ``A100`` is any of four. Names are compared without regard to case, spaces and
dashes. Figures that no public document gives are left out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from mlinfra_sdk.errors import did_you_mean

GB = 10**9


class Tflops(msgspec.Struct, frozen=True, omit_defaults=True):
    """Peak rates without sparsity, in 10^12 operations a second; None: not published."""

    fp32: float | None = None
    tf32: float | None = None
    bf16: float | None = None
    fp16: float | None = None


class Accelerator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One part. ``devices`` are the names that its driver gives it, ``counts_as`` is the part that
    it may stand in for, ``source`` is the vendor's document and ``seen`` the day (ISO) on which
    its figures were looked up (in public copies of it)."""

    name: str
    vendor: str
    devices: tuple[str, ...]
    memory_gb: int
    bandwidth_gb_s: int
    source: str
    seen: str
    aliases: tuple[str, ...] = ()
    counts_as: str = ""
    tflops: Tflops = Tflops()


class Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A name for several parts."""

    name: str
    parts: tuple[str, ...]
    aliases: tuple[str, ...] = ()


class _File(msgspec.Struct, forbid_unknown_fields=True):
    parts: tuple[Accelerator, ...]
    groups: tuple[Group, ...]


class Device(msgspec.Struct, frozen=True):
    """An accelerator as the driver of a machine names it; ``memory`` in bytes."""

    name: str
    memory: int


class Catalog:
    """The accelerators by their names. Get it by :func:`catalog`."""

    def __init__(self, parts: Iterable[Accelerator], groups: Iterable[Group]) -> None:
        self.parts = {part.name: part for part in parts}
        self.groups = {group.name: group for group in groups}
        self._canonical: dict[str, str] = {}
        for name, alias in self.spellings():
            self._canonical[_plain(alias)] = name
        self._devices = {
            _plain(device): part.name for part in self.parts.values() for device in part.devices
        }

    def spellings(self) -> Iterator[tuple[str, str]]:
        """(canonical name, spelling) of everything that may be written."""
        entries: list[Accelerator | Group] = [*self.parts.values(), *self.groups.values()]
        for entry in entries:
            for alias in (entry.name, *entry.aliases):
                yield entry.name, alias

    @property
    def names(self) -> list[str]:
        """The canonical names; those of parts that belong to a group are last."""
        grouped = {part for group in self.groups.values() for part in group.parts}
        return sorted([*self.groups, *self.parts], key=lambda name: (name in grouped, name))

    def canonical(self, name: str) -> str | None:
        """The canonical name for one as a user or a provider writes it."""
        return self._canonical.get(_plain(name))

    def nearest(self, name: str) -> str:
        """A sentence that proposes a known name, or nothing."""
        return did_you_mean(name, self.names, cutoff=0.6)  # one wrong letter in A10

    def parts_of(self, name: str) -> frozenset[str]:
        """The parts that satisfy a canonical name; none if it is unknown."""
        group = self.groups.get(name)
        named = group.parts if group else (name,) if name in self.parts else ()
        stand_ins = (part.name for part in self.parts.values() if part.counts_as in named)
        return frozenset((*named, *stand_ins)) if named else frozenset()

    def part_of_device(self, device: Device) -> str:
        """The part that a driver's name means, or an empty text."""
        return self._devices.get(_plain(device.name), "")

    def memory(self, name: str) -> int:
        """Bytes that every accelerator of this canonical name has at least; 0 if unknown."""
        return min((self.parts[it].memory_gb * GB for it in self.parts_of(name)), default=0)

    def label(self, device: Device) -> str:
        """A short name for a device: the catalog's, else the driver's."""
        return self.part_of_device(device) or device.name


def _plain(name: str) -> str:
    """A name without what people write in different ways."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^(nvidia)?(geforce|tesla)?", "", plain)


@functools.cache
def catalog() -> Catalog:
    """The catalog that this package brings; read at its first use."""
    data = Path(__file__).with_name("accelerators.json").read_bytes()
    file = msgspec.json.decode(data, type=_File)
    return Catalog(file.parts, file.groups)
