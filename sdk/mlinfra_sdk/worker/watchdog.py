"""The machine's own ends, enforced on it whether or not any client still exists."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import anyio
import msgspec

TICK = 1.0


class Limits(msgspec.Struct, frozen=True):
    """When the machine ends by itself. All in seconds.

    ``idle``: no cell ran for so long. ``time``: so long after its start in any case.
    ``lease``: no client was heard of for so long, even if a cell runs.
    """

    idle: float = 900.0
    time: float | None = None
    lease: float = 7200.0


class Watchdog:
    """Counts towards the limits; ``busy()`` says whether work is going on, ``connected()``
    whether a client is there. Without ``folder``, the agent's directory, no client can find it."""

    def __init__(
        self,
        limits: Limits,
        folder: Path,
        *,
        busy: Callable[[], bool],
        connected: Callable[[], bool],
    ) -> None:
        self.started = time.time()
        self._limits = limits
        self._folder = folder
        self._busy = busy
        self._connected = connected
        self._reason: str | None = None
        self._ended = anyio.Event()
        now = time.monotonic()
        self._start = self._contact = self._work = now

    @property
    def reason(self) -> str | None:
        """Why the machine ends, once it does."""
        return self._reason

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last work."""
        return 0.0 if self._busy() else time.monotonic() - self._work

    def touch(self) -> None:
        """A client asked for something, or work ended."""
        self._contact = self._work = time.monotonic()

    def limit(self, *, idle: float, time: float | None) -> None:
        """Put other limits in place of the present ones."""
        self._limits = msgspec.structs.replace(self._limits, idle=idle, time=time)

    def end(self, reason: str) -> None:
        """End now."""
        self._reason = self._reason or reason
        self._ended.set()

    async def wait(self) -> str:
        """Until one of the ends is reached; gives the reason."""
        while self._reason is None:
            with anyio.move_on_after(TICK):
                await self._ended.wait()
            self._check()
        return self._reason

    def _check(self) -> None:
        now = time.monotonic()
        limits = self._limits
        if self._busy():
            self._work = now
        if self._connected():
            self._contact = now
        if now - self._work > limits.idle:
            self.end(f"idle for {limits.idle:g} s")
        elif limits.time is not None and now - self._start > limits.time:
            self.end(f"its time of {limits.time:g} s was over")
        elif now - self._contact > limits.lease:
            self.end(f"no client for {limits.lease:g} s")
        elif not self._folder.exists():
            self.end("its directory was deleted")
