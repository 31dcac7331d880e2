"""Patches libraries when they are imported, and not before."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .bars import patch_tqdm
from .libraries import LIBRARIES
from .loops import TQDM

logger = logging.getLogger(__name__)

_PATCHES: dict[str, Callable[[ModuleType], None]] = {TQDM: patch_tqdm, **LIBRARIES}


def watch() -> None:
    """From now on, loops of the libraries that are known here are counted."""
    for name in _PATCHES:
        if name in sys.modules:
            _patch(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _patch(module: ModuleType) -> None:
    if vars(module).get("_mlinfra_patched"):
        return
    vars(module)["_mlinfra_patched"] = True
    try:
        _PATCHES[module.__name__](module)
    except Exception:  # another version than those that are known: it is not counted
        logger.debug("The loops of %s are not counted", module.__name__, exc_info=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Has a module patched after it has run."""

    def __init__(self) -> None:
        self._looking: set[str] = set()

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Of the modules that are waited for."""
        if fullname not in _PATCHES or fullname in self._looking:
            return None
        self._looking.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looking.discard(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _patch(module)

            loader.exec_module = exec_module
        return spec
