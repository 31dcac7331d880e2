"""Where modules come from, and what those of the workspace import."""

from __future__ import annotations

import importlib.util
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.machinery import FileFinder, ModuleSpec, PathFinder
from pathlib import Path

from mlinfra_sdk.namespace.imports import imports_of_source

_MOST_FILES = 2000
"""Files of one package of the workspace that are looked through."""


def is_standard(module: str) -> bool:
    """Whether Python itself brings the module."""
    top = module.partition(".")[0]
    return top in sys.stdlib_module_names or top in ("__main__", "__mp_main__", "_distutils_hack")


def origins(module: str) -> list[Path]:
    """The file of a module, or of the outermost package with a file that it is in; else the folders
    of the package without one. Empty if no file holds it. Nothing is imported."""
    top, *inner = module.split(".")
    spec = getattr(sys.modules.get(top), "__spec__", None)
    if spec is None:
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            return []
    file, folders = _places([spec])
    name = top
    for part in inner:
        if file is not None:
            break
        name = f"{name}.{part}"
        file, deeper = _places(_specs_in(name, folders))
        if file is None and not deeper:
            break  # a name in the package, or nothing
        folders = deeper
    return [file] if file is not None else [Path(folder) for folder in folders]


def _places(specs: Iterable[ModuleSpec | None]) -> tuple[Path | None, list[str]]:
    folders: list[str] = []
    for spec in specs:
        if spec is not None:
            if spec.origin and spec.has_location:
                return Path(spec.origin), []
            folders += spec.submodule_search_locations or ()
    return None, folders


def _specs_in(name: str, folders: Sequence[str]) -> Iterator[ModuleSpec | None]:
    """What holds a module of a package without a file, which may not be imported yet."""
    yield getattr(sys.modules.get(name), "__spec__", None)
    for hook in sys.meta_path:
        if hook is not PathFinder:  # which asks the imported package for its folders
            try:
                yield hook.find_spec(name, folders)
            except (ImportError, KeyError):
                continue
    for folder in folders:
        finder = pkgutil.get_importer(folder)
        if isinstance(finder, FileFinder):
            yield finder.find_spec(name)


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
