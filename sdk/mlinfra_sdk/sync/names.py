"""Paths inside of a workspace: which are allowed, and names for what was in conflict."""

from __future__ import annotations

import os
import posixpath

from mlinfra_sdk.errors import SyncError

TEMPORARY = b".mlinfra-tmp-"
"""How the names of files begin that are being written."""
_LONGEST_NAME = 255
_LONGEST_PATH = 4096


def parts(path: bytes) -> list[bytes]:
    """The components of a path that stays inside of its root, whoever it comes from.

    Raises :class:`SyncError` for everything else.
    """
    components = path.split(b"/")
    for part in components:
        check(path, part)
    return components


def check(path: bytes, part: bytes) -> None:
    """Raises :class:`SyncError` for a path with this component, if that is none."""
    if part in (b"", b".", b"..") or b"\0" in part or len(part) > _LONGEST_NAME:
        raise SyncError(f"{shown(path)!r} is no path inside of a workspace.")
    if part.startswith(TEMPORARY):
        raise SyncError(f"{shown(path)!r} is a name for unfinished files.")
    if len(path) > _LONGEST_PATH:
        raise SyncError(f"A path of {len(path)} bytes is too long.")


def link_stays_inside(path: bytes, target: bytes) -> bool:
    """Whether a symbolic link at ``path`` leads to somewhere inside of the root.

    ``..`` may only come first, and not too often: after a component that is itself a link it
    would lead elsewhere than it seems.
    """
    if not target or target.startswith(b"/") or b"\0" in target:
        return False
    depth = path.count(b"/")
    steps = target.split(b"/")
    while steps and steps[0] == b"..":
        steps.pop(0)
        depth -= 1
    return depth >= 0 and b".." not in steps


def ancestors(path: bytes) -> list[bytes]:
    """The directories above a path, the nearest first, without the root."""
    found = []
    while path := posixpath.dirname(path):
        found.append(path)
    return found


def conflict_name(path: bytes, machine: str, when: str) -> bytes:
    """``name (conflict from MACHINE WHEN).ext`` beside ``path``, shortened to what file systems
    allow."""
    folder, name = posixpath.split(path)
    stem, extension = posixpath.splitext(name)
    mark = os.fsencode(f" (conflict from {machine} {when})".replace("/", "-"))
    if len(extension) > 32:
        stem, extension = name, b""
    room = _LONGEST_NAME - len(mark) - len(extension)
    if len(stem) > room:
        stem = stem[:room].decode(errors="ignore").encode() or stem[:room]
    return posixpath.join(folder, stem + mark + extension)


def shown(path: bytes) -> str:
    """A path in messages; bytes that are no text appear as escapes."""
    return path.decode(errors="backslashreplace")
