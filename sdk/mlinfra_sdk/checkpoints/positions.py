"""Where loops are, and how they get there again."""

from __future__ import annotations

import itertools
import pickle
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from mlinfra_sdk.checkpoints import random_state
from mlinfra_sdk.checkpoints.manifest import Position


class Frame:
    """A loop under way: ``done`` of its items are."""

    def __init__(self, items: Iterable[Any], ordinal: int, every: int) -> None:
        self.done = 0
        self.ordinal = ordinal
        self.every = every
        self._items = items
        self._inner = 0
        self._start = b""

    @property
    def position(self) -> Position:
        """What is to be remembered of it."""
        return Position(self.done, self.ordinal, self._start)

    def begin_inner(self) -> int:
        """A loop begins within the present item; gives its number there."""
        number, self._inner = self._inner, self._inner + 1
        return number

    def advance(self) -> None:
        """The present item is done."""
        self.done += 1
        self._inner = 0

    def iterator(self, position: Position | None) -> Iterator[Any]:
        """The items that are left. A shuffled one draws its order when it begins, from the
        generators as they were then."""
        loader = _is_loader(self._items)
        done = self.done = position.done if position is not None else 0
        if isinstance(self._items, range | list | tuple):
            return iter(self._items[done:])
        generators = _generators(self._items) if loader else []
        if loader and position is not None and position.start:
            rng, own = pickle.loads(position.start)
            random_state.put(rng)
            for generator, state in zip(generators, own, strict=True):
                generator.set_state(state)
        if loader:
            own = [generator.get_state() for generator in generators]
            self._start = pickle.dumps((random_state.get(), own))
        if loader and done and _skippable(self._items):
            return _rest_of_loader(self._items, done)
        iterator = iter(self._items)
        next(itertools.islice(iterator, done, done), None)
        return iterator


class Place(NamedTuple):
    """Where a loop was when the checkpoint was made: ``skipped`` if it was over by then."""

    position: Position
    innermost: bool
    skipped: bool


class Resumption:
    """Brings loops back to where they were, the outermost first. ``rng`` is the state of the
    generators that the innermost one goes on with."""

    def __init__(self, positions: Sequence[Position], rng: dict[str, Any] | None) -> None:
        self._positions = positions
        self.rng = rng

    def at(self, depth: int, ordinal: int) -> Place | None:
        """Where the loop at this depth was, if it was or had been."""
        if depth >= len(self._positions):
            return None
        position = self._positions[depth]
        if ordinal > position.ordinal:
            return None
        last = depth == len(self._positions) - 1
        return Place(position, last, ordinal < position.ordinal)


def _is_loader(items: Any) -> bool:
    torch = sys.modules.get("torch.utils.data")
    return torch is not None and isinstance(items, torch.DataLoader)


def _generators(loader: Any) -> list[Any]:
    """The generators of its own that a loader's order comes from."""
    owners = (loader, loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    found = [getattr(it, "generator", None) for it in owners]
    return list({id(it): it for it in found if it is not None}.values())


def _skippable(loader: Any) -> bool:
    """Whether what is left can be had without loading what comes before: workers have generators
    of their own, which each item may have moved on."""
    return loader.num_workers == 0 and loader.batch_sampler is not None


def _rest_of_loader(loader: Any, done: int) -> Iterator[Any]:
    """The batches after the first ``done``, of which only the indices are drawn."""
    iterator: Any = iter(loader)
    for _ in itertools.islice(iterator._sampler_iter, done):
        iterator._num_yielded += 1
    rest: Iterator[Any] = iterator
    return rest
