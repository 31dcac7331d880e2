"""How much a machine has cost at an instant, as its provider meters it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import msgspec

from .attribution import Cost, attribute
from .records import Price

_HOUR = 3600.0
_GB = 10**9


class Interval(msgspec.Struct, frozen=True):
    """A rate in micro-USD per hour (egress: per GB) from ``since`` to ``until``, or on."""

    kind: str
    since: float
    until: float | None
    rate: int


class Meter(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a machine's bill.

    ``price`` holds from ``started`` on, until an interval of kind ``machine`` puts another rate in
    its place. Intervals of kind ``storage`` come on top, also when the machine is stopped. What
    the steps of billing add is known, and counted, when the machine stops.
    """

    price: Price
    started: float
    stopped: float | None
    intervals: Sequence[Interval] = ()

    def costs(
        self,
        runs: Iterable[tuple[int, float, float, int]],
        transferred: Iterable[tuple[float, int]],
        *,
        since: float,
        until: float,
    ) -> Cost:
        """The cost between two instants, divided among runs (id, start, end, bytes brought back).
        ``transferred`` are bytes that were brought back beside them, and when."""
        stopped = until if self.stopped is None else min(self.stopped, until)
        end = max([stopped, *(min(until, until_or(it, until)) for it in self._of("storage"))])
        runs = list(runs)
        pieces = self._pieces(stopped)

        def exactly(moment: float) -> float:
            return (
                sum(rate * max(0.0, min(moment, last) - first) for first, last, rate in pieces)
                / _HOUR
            )

        def accrued(moment: float) -> int:
            return int(exactly(moment))

        found = attribute(
            accrued,
            self.started,
            end,
            [(run, opened, min(closed, stopped)) for run, opened, closed, _ in runs],
            since=since,
            until=until,
        )
        added = 0
        if self.stopped is not None and since < self.stopped <= until:
            # Instants are floats: the sum may be a whole number but for that.
            whole = int(exactly(self.stopped) + self._added_by_steps() + 1e-6)
            added = max(0, whole - accrued(self.stopped))
        brought = [(closed, size, run) for run, _, closed, size in runs if size]
        brought += [(moment, size, 0) for moment, size in transferred]
        shares = dict(found.runs)
        for moment, size, run in brought:
            amount = self._egress(moment, size) if since < moment <= until else 0
            if run and amount:
                shares[run] = shares.get(run, 0) + amount
            else:
                added += amount
        return Cost(
            found.total + added + sum(shares.values()) - sum(found.runs.values()),
            found.idle + added,
            max(0.0, stopped - max(self.started, since)),
            shares,
        )

    def _of(self, kind: str) -> list[Interval]:
        return sorted((it for it in self.intervals if it.kind == kind), key=lambda it: it.since)

    def _pieces(self, stopped: float) -> list[tuple[float, float, int]]:
        """Begin, end and rate of each piece of what accrues with time."""
        changes = self._of("machine")
        starts = [(self.started, self.price.micro_per_hour)]
        for it in changes:
            if it.since <= self.started:
                starts = [(self.started, it.rate)]
            else:
                starts.append((it.since, it.rate))
        ends = [since for since, _ in starts[1:]] + [math.inf]
        pieces = [
            (since, min(end, stopped), rate)
            for (since, rate), end in zip(starts, ends, strict=True)
            if since < stopped
        ]
        return pieces + [(it.since, until_or(it, math.inf), it.rate) for it in self._of("storage")]

    def _added_by_steps(self) -> float:
        """What a bill in whole steps adds to the time that the machine really ran."""
        assert self.stopped is not None
        seconds = max(0.0, self.stopped - self.started)
        billed = seconds
        if self.price.granularity_s:
            steps = math.ceil(round(seconds / self.price.granularity_s, 6))
            billed = max(seconds, steps * self.price.granularity_s)
        billed = max(billed, self.price.minimum_s)
        rate = next(
            (it.rate for it in reversed(self._of("machine")) if it.since <= self.stopped),
            self.price.micro_per_hour,
        )
        return rate * (billed - seconds) / _HOUR

    def _egress(self, moment: float, size: int) -> int:
        for it in reversed(self._of("egress")):
            if it.since <= moment < until_or(it, math.inf):
                return it.rate * size // _GB
        return 0


def until_or(interval: Interval, end: float) -> float:
    """When the interval ends, or ``end`` if that is not known."""
    return end if interval.until is None else interval.until


def spread(amount: int, started: float, stopped: float) -> Callable[[float], int]:
    """A billed amount as if it had accrued evenly."""
    length = max(stopped - started, 1e-9)
    return lambda moment: int(amount * min(1.0, max(0.0, (moment - started) / length)))
