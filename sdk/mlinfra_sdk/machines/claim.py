"""Only one process at a time looks for a machine of some name, and launches it if there is none.

The others can read what it is waiting for."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio

from mlinfra_sdk import paths

_POLL = 0.02
_LONGEST = 2000
"""Bytes of what is said."""


@asynccontextmanager
async def claimed(name: str) -> AsyncIterator[Callable[[str], None]]:
    """Wait until nobody else is in here for this name. A process that is killed leaves at once:
    the claim is a lock on a file, which ends with its holder. Gives a function that says to others
    what is waited for (:func:`said`)."""
    path = _path(name)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    fd = await _locked(path)
    said = ""

    def say(text: str) -> None:
        nonlocal said
        if text != said:
            said = text
            with suppress(OSError):  # a full disk must not end a launch
                data = text.encode()[:_LONGEST]
                os.pwrite(fd, data, 0)
                os.ftruncate(fd, len(data))

    try:
        yield say
    finally:
        path.unlink()
        os.close(fd)


def said(name: str) -> str:
    """What is waited for by whoever is in there for this name; empty if nobody is."""
    if not is_claimed(name):
        return ""
    with suppress(OSError):
        return _path(name).read_text(errors="replace")
    return ""


def is_claimed(name: str) -> bool:
    """Whether somebody is in there for this name now."""
    try:
        fd = os.open(_path(name), os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _path(name: str) -> Path:
    return paths.data_dir() / "claims" / name.replace("/", "_")


async def _locked(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await anyio.sleep(_POLL)
            # Its last holder removed it: whoever comes next makes a new file.
            if _is(path, fd):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False
