"""What a launch waits for, told while it waits.

Whoever launches listens (:func:`listening`); a provider, or what it calls, says in a few words what
it is at (:func:`tell`): ``queued at Slurm, position 3 of 7``, ``pulling the image``. Nothing has to
be passed through the layers between, and without a listener nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_listener: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


def tell(text: str) -> None:
    """Say what is waited for now. Costs nothing; may be called as often as one likes."""
    listener = _listener.get()
    if listener is not None:
        listener(text)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """What this task, and tasks and threads that it starts, tell goes to ``listener``, which is
    called in their threads and must not block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
