"""Who caused which part of a machine's cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec


class Cost(msgspec.Struct, frozen=True):
    """Micro-USD, and machine time in seconds; ``total == idle + sum(runs.values())`` always."""

    total: int = 0
    idle: int = 0
    seconds: float = 0.0
    runs: dict[int, int] = {}

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.total + other.total,
            self.idle + other.idle,
            self.seconds + other.seconds,
            self.runs | other.runs,
        )


def attribute(
    accrued: Callable[[float], int],
    started: float,
    stopped: float,
    runs: Iterable[tuple[int, float, float]],
    *,
    since: float,
    until: float,
) -> Cost:
    """Divide what a machine cost between ``since`` and ``until`` among its runs (id, start, end);
    ``accrued`` gives what it has cost in all at an instant.

    Each instant is paid by the runs active then, in equal parts, or is idle. The cost of a piece
    is the difference of the machine's cost so far at its two ends, so rounding never loses a
    micro-USD.
    """
    begin, end = max(started, since), min(stopped, until)
    if end <= begin:
        return Cost()
    events: list[tuple[float, int, int]] = []
    for run_id, opened, closed in runs:
        opened, closed = max(opened, begin), min(closed, end)
        if opened < closed:
            events += ((opened, 1, run_id), (closed, 0, run_id))
    events.sort()
    shares: dict[int, int] = {}
    active: dict[int, None] = {}
    idle = 0
    time = begin
    spent = first = accrued(begin)
    for moment, opens, run_id in (*events, (end, 0, -1)):
        reached = accrued(moment)
        if moment > time:
            idle += _share(reached - spent, active, shares)
            time, spent = moment, reached
        if opens:
            active[run_id] = None
        else:
            active.pop(run_id, None)
    return Cost(spent - first, idle, end - begin, shares)


def _share(amount: int, active: Iterable[int], shares: dict[int, int]) -> int:
    """Divide an amount among the active runs; returns what nobody caused."""
    payers = list(active)
    if not payers:
        return amount
    part, rest = divmod(amount, len(payers))
    for position, run_id in enumerate(payers):
        shares[run_id] = shares.get(run_id, 0) + part + (position < rest)
    return 0
