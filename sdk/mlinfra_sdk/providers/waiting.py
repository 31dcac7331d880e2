"""What a launch waits for, told while it waits, and when the machine began to run.

Whoever launches listens (:func:`listening`); a provider, or what it calls, says in a few words what
it is at (:func:`tell`): ``queued at Slurm, position 3 of 7``, ``pulling the image``. Nothing has to
be passed through the layers between, and without a listener nothing happens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Beginning:
    """When a machine that is launched began to run, Unix time; None while it does not."""

    at: float | None = None


_listeners: ContextVar[tuple[Callable[[str], None], ...]] = ContextVar("listeners", default=())
_beginning: ContextVar[Beginning | None] = ContextVar("beginning", default=None)


def tell(text: str) -> None:
    """Say what is waited for now. Costs nothing; may be called as often as one likes."""
    for listener in _listeners.get():
        listener(text)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """What this task, and tasks and threads that it starts, tell goes to ``listener`` too, which is
    called in their threads and must not block."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


def runs() -> None:
    """Say that the machine runs, and costs, since now: what went before, in queues and for images,
    is not billed. Only the first word counts."""
    beginning = _beginning.get()
    if beginning is not None and beginning.at is None:
        beginning.at = time.time()


@contextmanager
def beginning() -> Iterator[Beginning]:
    """Learn when a machine that is launched within began to run."""
    it = Beginning()
    token = _beginning.set(it)
    try:
        yield it
    finally:
        _beginning.reset(token)
