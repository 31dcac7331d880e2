"""The machine's own ends, enforced on it whether or not any client still exists."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import msgspec

TICK = 1.0
OF_BUDGET = "its budget was spent"
NOTICE = 60.0
"""Seconds before an end at which those are told who have asked for it by
:meth:`Watchdog.when_ending`; a fifth of the limit if that is shorter."""


class Limits(msgspec.Struct, frozen=True):
    """When the machine ends by itself. All in seconds.

    ``idle``: no cell ran for so long, and no GPU worked. ``time``: so long after its start in any
    case. ``lease``: no client was heard of for so long, even if a cell runs. ``paid``: so long
    after its start, for more is not in its budgets, of which ``budget`` names the tightest.
    """

    idle: float = 900.0
    time: float | None = None
    lease: float = 7200.0
    paid: float | None = None
    budget: str = ""


class End(msgspec.Struct, frozen=True):
    """One of a machine's ends: ``seconds`` from now, unless something postpones it. ``cause`` is
    ``idle``, ``time``, ``lease``, ``budget`` or ``preemption``, which nothing postpones; ``reason``
    is what the ledger will say."""

    cause: str
    seconds: float
    reason: str


_BY_DESIGN = (
    "idle",
    "its time",
    "no client",
    "its budget",
    "stopped by",
    "asked by",
    "its directory",
)


def by_design(reason: str) -> bool:
    """Whether a machine that ended for this reason was meant to end: by a limit, or its user."""
    return reason.removeprefix("it was ").startswith(_BY_DESIGN)


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
        self._kept = now
        """Not idle before that."""
        self._paid = None if limits.paid is None else now + limits.paid
        self._paid_for = limits.paid or 0.0
        """Seconds for which the budgets paid when they last paid for more."""
        self._taken: tuple[float, str] | None = None
        """When somebody else ends the machine, and why."""
        self._notices: list[Callable[[End], None]] = []
        self._told: set[str] = set()
        """The causes of the ends of which notice was given."""

    @property
    def reason(self) -> str | None:
        """Why the machine ends, once it does."""
        return self._reason

    @property
    def uptime(self) -> float:
        """Seconds since the start, by a clock that nobody sets."""
        return time.monotonic() - self._start

    @property
    def idle_seconds(self) -> float:
        """Seconds since the last work."""
        return 0.0 if self._busy() else time.monotonic() - self._work

    def heard(self) -> None:
        """A client asked for something that is no work."""
        self._contact = time.monotonic()

    def touch(self) -> None:
        """A client asked for work, or work ended."""
        self._contact = self._work = time.monotonic()

    def worked(self) -> None:
        """Something goes on that no client has asked for: a GPU is busy."""
        self._work = time.monotonic()

    def limit(self, *, idle: float, time: float | None) -> None:
        """Put other limits in place of the present ones."""
        self._limits = msgspec.structs.replace(self._limits, idle=idle, time=time)

    def pay(self, seconds: float | None, budget: str) -> None:
        """From now on so many seconds more are in the budgets; None: there is no budget."""
        self._limits = msgspec.structs.replace(self._limits, budget=budget)
        now = time.monotonic()
        if seconds is not None and seconds > (self._paid or now) - now:
            self._paid_for = seconds
        self._paid = None if seconds is None else now + seconds

    def extend(self, seconds: float) -> None:
        """Do not end for being idle, or for its time, before so many seconds from now."""
        now = time.monotonic()
        self._contact = now
        self._kept = max(self._kept, now + seconds)
        at_least = now + seconds - self._start
        if self._limits.time is not None and self._limits.time < at_least:
            self._limits = msgspec.structs.replace(self._limits, time=at_least)

    def taken_away(self, seconds: float, reason: str) -> None:
        """Somebody else ends the machine in so many seconds: those are told at once who want to
        know of ends, and what runs may go on until then. A machine without work ends now."""
        at = time.monotonic() + seconds
        if self._taken is None or at < self._taken[0]:
            self._taken = at, reason
        self._check()

    def when_ending(self, tell: Callable[[End], None]) -> None:
        """Call ``tell`` once when an end comes near (:data:`NOTICE`), and again if it was postponed
        since and comes near again."""
        self._notices.append(tell)

    def ends(self) -> list[End]:
        """Every end that the machine has, the next one first."""
        now = time.monotonic()
        limits = self._limits
        worked = now if self._busy() else self._work
        heard = now if self._connected() else self._contact
        found = [
            End("idle", max(worked + limits.idle, self._kept) - now, f"idle for {limits.idle:g} s"),
            End("lease", heard + limits.lease - now, f"no client for {limits.lease:g} s"),
        ]
        if limits.time is not None:
            reason = f"its time of {limits.time:g} s was over"
            found.append(End("time", self._start + limits.time - now, reason))
        if self._paid is not None:
            reason = f"{OF_BUDGET}: {limits.budget}"
            found.append(End("budget", self._paid - now, reason))
        if self._taken is not None:
            at, reason = self._taken
            found.append(End("preemption", at - now, reason))
        return sorted(found, key=lambda end: end.seconds)

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
        if self._busy():
            self._work = now
        if self._connected():
            self._contact = now
        ends = self.ends()
        if ends[0].seconds <= 0:
            self.end(ends[0].reason)
        elif not self._folder.exists():
            self.end("its directory was deleted")
        elif self._taken is not None and not self._busy():
            self.end(self._taken[1])  # a cell that would come now were lost with it
        else:
            self._give_notice(ends)

    def _give_notice(self, ends: list[End]) -> None:
        near = {end.cause: end for end in ends if end.seconds <= self._notice(end.cause)}
        for cause, end in near.items():
            if cause not in self._told:
                for tell in self._notices:
                    tell(end)
        self._told = set(near)

    def _notice(self, cause: str) -> float:
        if cause == "preemption":
            return math.inf
        limits = self._limits
        whole = {
            "idle": limits.idle,
            "lease": limits.lease,
            "time": limits.time,
            "budget": self._paid_for,
        }[cause]
        return min(NOTICE, (whole or 0.0) / 5)
