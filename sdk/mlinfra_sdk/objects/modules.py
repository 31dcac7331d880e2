"""Modules travel by name and are imported over there when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any


class LazyModule(ModuleType):
    """Stands for a module until something of it is used; then it delegates to the real one."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("__name__", "__class__"):
            return super().__getattribute__(name)
        return getattr(real_module(self), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(real_module(self), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(real_module(self), name)

    def __dir__(self) -> list[str]:
        return dir(real_module(self))

    def __repr__(self) -> str:
        return f"<module {self.__name__!r}, not used yet>"


def real_module(module: ModuleType) -> ModuleType:
    """The module itself, imported if needed."""
    return importlib.import_module(module.__name__) if type(module) is LazyModule else module


def module_by_name(name: str) -> ModuleType:
    """The module if it is loaded, else a stand-in that imports it on first use."""
    return sys.modules.get(name) or LazyModule(name)


def loaded_submodules(packages: Iterable[str], identifiers: Iterable[str]) -> list[str]:
    """Loaded modules below the packages whose dotted names consist of the identifiers."""
    waiting, found = list(packages), []
    while waiting:
        package = waiting.pop()
        loaded = [f"{package}.{name}" for name in identifiers if f"{package}.{name}" in sys.modules]
        found += loaded
        waiting += loaded
    return sorted(found)
