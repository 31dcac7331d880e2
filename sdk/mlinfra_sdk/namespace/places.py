"""The working directory and ``sys.path``, where both sides have a workspace of the same name.

What lies inside of a workspace means the same place on the other side: ``%cd data`` here is the
twin's ``data`` there. Everything else stays what it is on each side.
"""

from __future__ import annotations

import functools
import os
import sys
from contextlib import suppress

_here: dict[str, str] = {}
"""Roots of workspaces on this side, by their names."""
_base = ""
"""On a machine, the directory that all workspaces lie in."""

Place = tuple[str, str]
"""The name of a workspace, and a path in it (empty: the root)."""


def register(name: str, root: str) -> None:
    """The workspace of this name lies here."""
    _here[name] = os.path.realpath(root)


def set_base(folder: str) -> None:
    """On a machine: all directories in this one are workspaces."""
    global _base
    _base = os.path.realpath(folder)


def _place(path: str) -> Place | None:
    real = os.path.realpath(path)
    for name, root in _here.items():
        if _contains(root, real):
            return name, os.path.relpath(real, root) if real != root else ""
    if _base and _contains(_base, real) and real != _base:
        name, _, rest = os.path.relpath(real, _base).partition(os.sep)
        return name, rest
    return None


def _contains(root: str, path: str) -> bool:
    return path == root or path.startswith(os.path.join(root, ""))


def _path(place: Place) -> str | None:
    """The path here; None if that workspace is not here."""
    name, inner = place
    root = _here.get(name) or (os.path.join(_base, name) if _base else "")
    if not root or os.sep in name or name in ("", ".", "..") or ".." in inner.split(os.sep):
        return None
    return os.path.join(root, inner) if inner else root


def get_cwd() -> Place | None:
    """Where in which workspace this process works."""
    return _place(os.getcwd()) if _here or _base else None


def set_cwd(place: Place) -> None:
    """Go there, or to the nearest directory above it that exists here."""
    name, inner = place
    if _base and (root := _path((name, ""))) is not None:
        with suppress(OSError):  # the first run may come before the first sync
            os.makedirs(root, mode=0o700, exist_ok=True)
    while (path := _path((name, inner))) is not None:
        if os.path.isdir(path):
            os.chdir(path)
            return
        if not inner:
            return
        inner = os.path.dirname(inner)


def get_sys_path() -> list[Place] | None:
    """Entries of ``sys.path`` inside of workspaces, in their order."""
    if not (_here or _base):
        return None
    return list(_entries(tuple(sys.path), tuple(_here.items())))


@functools.lru_cache(maxsize=4)
def _entries(path: tuple[str, ...], roots: tuple[tuple[str, str], ...]) -> list[Place]:
    """Asked for with every cell, and nearly always the same."""
    return [place for entry in path if (place := _entry(entry)) is not None]


def _entry(entry: str) -> Place | None:
    installed = entry.startswith((sys.prefix, sys.base_prefix)) or "site-packages" in entry
    return None if not entry or installed else _place(entry)


def set_sys_path(places: list[Place]) -> None:
    """Have these entries, and no others inside of workspaces."""
    mine = [path for place in places if (path := _path(place)) is not None]
    rest = [entry for entry in sys.path if _entry(entry) is None]
    first = 1 if rest[:1] == [""] else 0
    sys.path[:] = [*rest[:first], *mine, *rest[first:]]
