"""What has run, where, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlinfra_sdk.catalog import Gpu

from .hardware import Used


@dataclass(frozen=True)
class Place:
    """A kind of machine: what ``on=`` calls it, and its accelerators. Machines with the same
    accelerators count as one kind wherever they are."""

    target: str
    gpu: str = ""
    count: int = 0

    @property
    def kind(self) -> Place:
        """What counts of it."""
        return Place("", self.gpu, self.count) if self.gpu else self

    @property
    def name(self) -> str:
        """In words."""
        return str(Gpu(self.gpu, self.count)) if self.gpu else self.target


@dataclass(frozen=True)
class Past:
    """A run that has succeeded."""

    cell: str
    place: Place
    seconds: float
    used: Used = field(default_factory=Used)
