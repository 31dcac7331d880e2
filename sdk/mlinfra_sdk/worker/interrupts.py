"""When an interrupt may end what the kernel does."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator


class Interrupts:
    """SIGINT raises KeyboardInterrupt while the user's work is done, and never in the kernel's own
    code around it, where it would break the conversation with the agent.

    One that arrives when work has been handed over but has not begun yet is raised at its
    beginning; one that comes after the end of the work that it was meant for is forgotten.
    """

    def __init__(self) -> None:
        self._noted = 0.0

    def install(self) -> None:
        """From now on note interrupts. Call in the main thread."""
        signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: object) -> None:
        self._noted = time.monotonic()

    @contextlib.contextmanager
    def raised(self, handed_over: float) -> Iterator[None]:
        """Raise KeyboardInterrupt in here. ``handed_over`` is the time, on this computer's
        monotonic clock, at which the agent sent the work."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            if self._noted >= handed_over:
                raise KeyboardInterrupt
            yield
        finally:
            signal.signal(signal.SIGINT, self._note)
