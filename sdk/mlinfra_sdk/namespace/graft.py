"""Identity-preserving write-back: old objects take over the content of their new versions.

Two phases. *Resolving* walks the new graph and decides for every object what stands for it: the
old object it is paired with, itself, or (for immutable containers) a copy with its parts replaced;
nothing is changed yet. *Storing* then writes the contents. Containers that hash their elements are
filled last, when the elements have their final content.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from mlinfra_sdk.namespace import graft_arrays, graft_builtins
from mlinfra_sdk.namespace.graft_builtins import same


def graft(new_root: object, pairs: Mapping[int, object]) -> object:
    """Put the graph of ``new_root`` in the place of the old one and return what stands for it.

    ``pairs`` maps ``id(new)`` to the old object it came from. An old object that can be changed in
    place takes over the content of its new version, and every reference in the new graph to a
    paired object becomes a reference to the old one. Where in-place is impossible the new object
    is used. To graft several names at once pass a dict of them (it is changed in place).
    An object paired with itself is left alone and not walked.
    The caller keeps the new objects alive during the call.
    """
    work = Grafting(pairs)
    root = work.resolve(new_root)
    work.finish()
    return root


# Types whose objects refer to nothing that could be replaced.
_ATOMS: frozenset[type] = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, range, type),
        *(type(...), type(NotImplemented), types.ModuleType, types.BuiltinFunctionType),
    }
)


class _Kind(NamedTuple):
    """How objects of one type are handled; ``slots`` are their slot descriptors."""

    handler: Callable[[Grafting, Any], Any] | None
    slots: tuple[Any, ...]
    has_dict: bool


class Grafting:
    """The state of one :func:`graft`."""

    def __init__(self, pairs: Mapping[int, object]) -> None:
        self.pairs = pairs
        self.targets: dict[int, Any] = {}
        self.walks: list[Callable[[], None]] = []
        self.stores: list[Callable[[], object]] = []
        self.hashing_stores: list[Callable[[], None]] = []
        self.tensors = graft_arrays.Tensors()
        self._atoms = set(_ATOMS)
        self._kinds: dict[type, _Kind] = {}

    def resolve(self, new: Any) -> Any:
        """What stands for the new object; its content is walked later."""
        kind = type(new)
        if kind in self._atoms:
            return new
        key = id(new)
        if key in self.targets:
            return self.targets[key]
        handler = self.kind(kind).handler
        if handler is None:
            self._atoms.add(kind)
            return new
        target = new if self.pairs.get(key) is new else handler(self, new)
        self.targets[key] = target
        return target

    def kind(self, kind: type) -> _Kind:
        known = self._kinds.get(kind)
        if known is None:
            slots = _slots(kind)
            known = _Kind(_handler(kind, len(slots)), slots, kind.__dictoffset__ != 0)
            self._kinds[kind] = known
        return known

    def old(self, new: Any) -> Any:
        """The old object of the same type that the new one is paired with, or None."""
        old = self.pairs.get(id(new))
        return old if type(old) is type(new) else None

    def resolve_all(self, values: Iterable[Any]) -> list[Any]:
        return [self.resolve(value) for value in values]

    def atomic(self, values: Iterable[Any]) -> bool:
        """Whether no value needs a walk (decided by their types, at C speed)."""
        return set(map(type, values)) <= self._atoms

    def finish(self) -> None:
        """Walk what has been found, then write everything."""
        while self.walks:
            self.walks.pop()()
        for store in self.stores:
            store()
        for store in self.hashing_stores:
            store()
        self.tensors.relink()

    def attributes(self, new: Any, target: Any) -> None:
        """Let the target take over ``__dict__`` and ``__slots__`` of the new object."""
        kind = self.kind(type(new))
        if kind.has_dict:
            self.walks.append(lambda: self._walk_dict(new, target))
        if kind.slots:
            self.walks.append(lambda: self._walk_slots(kind.slots, new, target))

    def _walk_dict(self, new: Any, target: Any) -> None:
        attributes = object.__getattribute__(new, "__dict__")
        values = list(attributes.values())
        resolved = values if self.atomic(values) else self.resolve_all(values)
        if target is new and same(resolved, values):
            return
        content = dict(zip(attributes, resolved, strict=True))
        # What __getstate__ leaves out (locks, caches, hooks) did not travel: it stays.
        complete = not _has_getstate(type(new))

        def store() -> None:
            own = object.__getattribute__(target, "__dict__")
            if complete:
                own.clear()
            own.update(content)

        self.stores.append(store)

    def _walk_slots(self, slots: tuple[Any, ...], new: Any, target: Any) -> None:
        for slot in slots:
            value = _slot_value(slot, new)
            resolved = self.resolve(value)
            if resolved is not _slot_value(slot, target):
                store = slot.__delete__ if resolved is _EMPTY else slot.__set__
                arguments = () if resolved is _EMPTY else (resolved,)
                self.stores.append(functools.partial(store, target, *arguments))


def _has_getstate(kind: type) -> bool:
    default = getattr(object, "__getstate__", None)  # there since Python 3.11
    return getattr(kind, "__getstate__", None) is not default


_EMPTY = NotImplemented  # an atom that is no slot's value


def _slot_value(slot: Any, owner: Any) -> Any:
    try:
        return slot.__get__(owner)
    except AttributeError:
        return _EMPTY


_WORD = object.__basicsize__ // 2


def _handler(kind: type, slots: int) -> Callable[[Grafting, Any], Any] | None:
    for base in kind.__mro__:
        name = f"{base.__module__}.{base.__qualname__}"
        if name in graft_arrays.HANDLERS:
            return graft_arrays.HANDLERS[name]
        if base in graft_builtins.HANDLERS:
            return None if _hidden_state(kind, base, slots) else graft_builtins.HANDLERS[base]
    return None


def _slots(kind: type) -> tuple[Any, ...]:
    return tuple(
        member
        for base in kind.__mro__
        if "__slots__" in vars(base)
        for member in vars(base).values()
        if isinstance(member, types.MemberDescriptorType)
    )


def _hidden_state(kind: type, base: type, slots: int) -> bool:
    """Whether objects of this kind hold more than their base, ``__dict__`` and ``__slots__``.

    That is so for types written in C (or Cython), whose state cannot be copied from outside.
    """
    words = slots
    words += kind.__dictoffset__ > 0 and base.__dictoffset__ <= 0
    words += kind.__weakrefoffset__ > 0 and base.__weakrefoffset__ <= 0
    return (
        kind.__itemsize__ != base.__itemsize__
        or kind.__basicsize__ != base.__basicsize__ + words * _WORD
    )
