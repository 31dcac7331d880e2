"""Stretches of memory that arrays and tensors of one graph are views of."""

from __future__ import annotations

import ctypes
from collections.abc import Hashable
from dataclasses import dataclass, field
from pickle import PickleBuffer
from typing import Any

# A shared stretch starts at a multiple of this, so that views of any item size fit into it.
_ALIGNMENT = 64


@dataclass
class Extent:
    """``size`` bytes of the memory named ``key``, from ``start``.

    ``owner`` keeps the memory alive; ``kind`` says what is rebuilt from it.
    """

    address: int
    start: int
    size: int
    owner: object
    rebuild: tuple[Any, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        function, *arguments = self.rebuild
        memory = (ctypes.c_char * self.size).from_address(self.address)
        return function, (PickleBuffer(memory), *arguments)


@dataclass
class Memories:
    """Which stretches of which memories the views of a graph use.

    The first pass over a graph gives each view its own stretch. Where views overlap, ``shared``
    of the next pass is ``overlapping()`` of the first, and those views get one common stretch.
    ``owned`` are the memories whose owner is in the graph itself: the others are views of it.
    """

    shared: dict[Hashable, tuple[int, int]] = field(default_factory=dict)
    owned: frozenset[Hashable] = frozenset()
    _claims: dict[Hashable, list[tuple[int, int]]] = field(default_factory=dict)
    _owners: dict[Hashable, tuple[int, int]] = field(default_factory=dict)
    _extents: dict[Hashable, Extent] = field(default_factory=dict)

    @property
    def keys(self) -> set[Hashable]:
        """All memories that are used."""
        return set(self._claims)

    def claim(
        self, key: Hashable, start: int, size: int, base: int, owner: object, *rebuild: Any
    ) -> Extent:
        """The stretch in which [start, start + size) of the memory at address ``base`` lies."""
        self._claims.setdefault(key, []).append((start, start + size))
        if key not in self.shared:
            return Extent(base + start, start, size, owner, rebuild)
        extent = self._extents.get(key)
        if extent is None:
            low, high = self.shared[key]
            extent = Extent(base + low, low, high - low, owner, rebuild)
            self._extents[key] = extent
        return extent

    def owns(self, key: Hashable, start: int, size: int) -> None:
        """The owner of the memory is in the graph."""
        self._owners[key] = start, start + size

    def owners(self) -> frozenset[Hashable]:
        """The memories whose owner is in the graph and contains all views."""
        found = set()
        for key, (start, end) in self._owners.items():
            claims = self._claims[key]
            if start <= min(claims)[0] and max(high for _, high in claims) <= end:
                found.add(key)
        return frozenset(found)

    def overlapping(self) -> dict[Hashable, tuple[int, int]]:
        """For each memory in which views overlap, the stretch that contains all its views."""
        result: dict[Hashable, tuple[int, int]] = {}
        for key, claims in self._claims.items():
            claims.sort()
            reach = -1
            for low, high in claims:
                if low < reach:
                    first = claims[0][0]
                    aligned = first - first % _ALIGNMENT if first >= 0 else first
                    result[key] = aligned, max(end for _, end in claims)
                    break
                reach = max(reach, high)
        return result
