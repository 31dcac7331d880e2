"""Modules of the workspace are loaded again when their files have changed.

The rule: before a cell runs, each loaded module below the machine's workspaces whose file is not
the one that it was loaded from is loaded again, and after it every module of the workspaces that
imports it, directly or not. IPython's autoreload does it in place: names that were imported from
the module and instances of its classes get the new code. Variables of the notebook stay what they
are. A module that cannot be loaded any more is taken out of ``sys.modules``, so that its next
import raises what is wrong with it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType
from typing import Any

_Times = tuple[int, int, int]


class WorkspaceModules:
    """The loaded modules below ``folder``."""

    def __init__(self, folder: str) -> None:
        self._prefix = os.path.join(os.path.realpath(folder), "") if folder else ""
        self._times: dict[str, tuple[ModuleType, _Times]] = {}
        self._loaded: set[str] = set()

    def note(self) -> None:
        """Take notice of modules that were loaded since the last time."""
        if not self._prefix:
            return
        loaded = set(sys.modules)
        for name in loaded - self._loaded - {"__main__"}:
            module = sys.modules[name]
            file = getattr(module, "__file__", None)
            if isinstance(file, str) and os.path.realpath(file).startswith(self._prefix):
                times = _times(file)
                if times is not None:
                    self._times[name] = module, times
        self._loaded = loaded

    def refresh(self) -> list[str]:
        """Load again what has changed; gives a sentence for each that could not be."""
        self.note()
        changed = set()
        for name, (module, times) in list(self._times.items()):
            if sys.modules.get(name) is not module:
                del self._times[name]
                self._loaded.discard(name)
                continue
            if _times(str(module.__file__)) not in (None, times):
                changed.add(name)
        self.note()
        if not changed:
            return []
        importlib.invalidate_caches()
        warnings = []
        for name in self._with_dependants(changed):
            module, before = self._times[name]
            times = _times(str(module.__file__)) or before
            try:
                _load_again(module)
            except Exception as error:
                sys.modules.pop(name, None)
                self._loaded.discard(name)
                del self._times[name]
                warnings.append(
                    f"The changed module {name} could not be loaded:"
                    f" {type(error).__name__}: {error}"
                )
            else:
                self._times[name] = module, times
        self.note()
        return warnings

    def _with_dependants(self, changed: set[str]) -> list[str]:
        """These and all that import them, each after what it imports itself."""
        imports = {name: self._imports(name) for name in self._times}
        affected = set(changed)
        while more := {
            name for name, used in imports.items() if name not in affected and used & affected
        }:
            affected |= more
        order: list[str] = []

        def visit(name: str, above: frozenset[str]) -> None:
            if name in order or name in above:
                return
            for used in sorted(imports[name] & affected):
                visit(used, above | {name})
            order.append(name)

        for name in sorted(affected):
            visit(name, frozenset())
        return order

    def _imports(self, name: str) -> set[str]:
        """Modules of the workspace that the source of a module imports."""
        module = self._times[name][0]
        found: set[str] = set()
        with suppress(OSError, SyntaxError, ValueError):
            with open(str(module.__file__), "rb") as file:
                tree = ast.parse(file.read())
            for imported in _imported(tree, getattr(module, "__package__", None) or ""):
                parts = imported.split(".")
                found |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
        return (found & self._times.keys()) - {name}


def _imported(tree: ast.AST, package: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                with suppress(ImportError):
                    base = importlib.util.resolve_name("." * node.level + base, package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _load_again(module: ModuleType) -> None:
    from IPython.extensions import autoreload

    superreload: Any = autoreload.superreload
    superreload(module)


def _times(file: str) -> _Times | None:
    with suppress(OSError):
        status = os.stat(file)
        return status.st_mtime_ns, status.st_size, status.st_ino
    return None
