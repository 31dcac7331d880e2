"""Transfers that go on in the portal's loop while their caller does something else."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Coroutine
from typing import Any

from mlinfra_sdk.machines.portal import Portal

Progress = Callable[[int, int], None]
"""Takes the bytes that are done, and those in all."""

_TELL_EVERY = 0.1


def unseen(done: int, total: int) -> None:
    """The :data:`Progress` of what nobody looks at."""


class Move:
    """How far a transfer of ``total`` bytes is. Nothing is to be moved until it is begun."""

    def __init__(self, total: int = 0) -> None:
        self.total = total
        self._done = 0
        self._measure: Callable[[], int] = lambda: self._done
        self._future: concurrent.futures.Future[int] = concurrent.futures.Future()
        self._future.set_result(0)

    def add(self, size: int) -> None:
        """So many bytes more have been moved."""
        self._done += size

    def watch(self, measure: Callable[[], int]) -> None:
        """Ask this how many bytes have been moved."""
        self._measure = measure

    def begin(self, portal: Portal, transfer: Coroutine[Any, Any, int]) -> Move:
        """Have this done, which gives the bytes that went over the link."""
        self._future = portal.submit(transfer)
        return self

    def wait(self, progress: Progress) -> int:
        """Until its end, which is that of ``transfer``; an interrupt cancels it."""
        try:
            while not concurrent.futures.wait([self._future], _TELL_EVERY).done:
                progress(min(self._measure(), self.total), self.total)
            return self._future.result()
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """What has not been moved need not be; nothing happens after the end."""
        self._future.cancel()
