"""A copy of the variables that code may use, so that no target sees what another one changes."""

from __future__ import annotations

import pickle
import types
from collections.abc import Iterable, Mapping
from typing import Any

import cloudpickle

from mlinfra_sdk.namespace.analysis import CellNames

_SHARED = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
"""What is not copied: it travels by name, or by its code."""


def isolated(namespace: Mapping[str, Any], names: CellNames) -> tuple[dict[str, Any], list[str]]:
    """A namespace of its own with all that the code may read, and the names of what could not be
    copied, which is left out. Variables that share objects share them in the copy, too."""
    needed = _reached(namespace, names)
    found = {name: namespace[name] for name in needed if isinstance(namespace[name], _SHARED)}
    data = {name: namespace[name] for name in needed if name not in found}
    try:
        return found | _copied(data), []
    except Exception:  # some of it cannot be pickled: one by one
        left_out = []
        for name, value in data.items():
            try:
                found |= _copied({name: value})
            except Exception:
                left_out.append(name)
        return found, left_out


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    buffers: list[bytearray] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        buffers.append(bytearray(buffer.raw()))
        return False

    data = cloudpickle.dumps(values, protocol=5, buffer_callback=keep)
    copy: dict[str, Any] = pickle.loads(data, buffers=buffers)
    return copy


def _reached(namespace: Mapping[str, Any], names: CellNames) -> list[str]:
    """The names that code reads, and those that functions and classes among them use."""
    if names.everything:
        return [name for name in namespace if not name.startswith("_")]
    found: dict[str, None] = {}
    waiting = sorted(names.reads)
    while waiting:
        name = waiting.pop()
        if name not in found and name in namespace:
            found[name] = None
            waiting += _names_in(namespace[name])
    return list(found)


def _names_in(value: object) -> Iterable[str]:
    """Global names that a function, or the methods of a class or of an instance's class, use."""
    if isinstance(value, types.FunctionType):
        return _names_of_code(value.__code__)
    kind = value if isinstance(value, type) else type(value)
    if kind.__module__ != "__main__":
        return ()
    members = (member for base in kind.__mro__ for member in vars(base).values())
    functions = (getattr(member, "__func__", getattr(member, "fget", member)) for member in members)
    return [
        name
        for function in functions
        if isinstance(function, types.FunctionType)
        for name in _names_of_code(function.__code__)
    ]


def _names_of_code(code: types.CodeType) -> list[str]:
    found = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += _names_of_code(constant)
    return found
