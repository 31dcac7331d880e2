"""What must be closed when this process ends, however it was left open."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Protocol


class Closeable(Protocol):
    """Something that keeps a machine for this process."""

    def close(self) -> None:
        """Give it up in good order."""
        ...

    def abandon(self) -> None:
        """Forget it: this process is a fork of the one that it belongs to."""
        ...


_open: set[Closeable] = set()


def opened(item: Closeable) -> None:
    """``item`` is closed at the end of this process, unless :func:`closed` is told before."""
    _open.add(item)


def closed(item: Closeable) -> None:
    """``item`` need not be closed any more."""
    _open.discard(item)


@atexit.register
def _close_all() -> None:
    for item in list(_open):
        try:
            item.close()
        except Exception as error:
            print(f"mlinfra: {error}", file=sys.stderr)


def _abandon_all() -> None:
    for item in _open:
        item.abandon()
    _open.clear()


os.register_at_fork(after_in_child=_abandon_all)
