"""Where modules come from, and what those of the workspace import."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from mlinfra_sdk.namespace.imports import imports_of_source

_MOST_FILES = 2000
"""Files of one package of the workspace that are looked through."""


def is_standard(module: str) -> bool:
    """Whether Python itself brings the module."""
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names or top in ("__main__", "__mp_main__", "_distutils_hack")


def origin(top: str) -> Path | None:
    """The file of a top-level module, or the folder of a package without one; None if there is
    none or no file holds it. Nothing is imported."""
    module = sys.modules.get(top)
    spec = getattr(module, "__spec__", None)
    if spec is None:
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            return None
    if spec is None:
        return None
    if spec.origin and spec.has_location:
        return Path(spec.origin)
    places = list(spec.submodule_search_locations or ())
    return Path(places[0]) if places else None


def imports_of_file(path: Path) -> Iterator[str]:
    """What a module of the workspace imports; of a package, all of its files."""
    if path.name == "__init__.py":
        path = path.parent
    files = path.rglob("*.py") if path.is_dir() else [path]
    for number, file in enumerate(files):
        if number == _MOST_FILES:
            break
        try:
            info = file.stat()
            yield from _imports_of_file(str(file), info.st_mtime_ns, info.st_size)
        except OSError:
            continue


@lru_cache(maxsize=4096)
def _imports_of_file(path: str, _mtime: int, _size: int) -> frozenset[str]:
    return frozenset(imports_of_source(Path(path).read_bytes()))
