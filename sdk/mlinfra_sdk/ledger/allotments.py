"""Of the ledger: shares of budgets, so that no two kernels spend the same money."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .file import LedgerFile

if TYPE_CHECKING:
    from .ledger import Costs

_MONTH = "month:"
_REMEMBERED = 300.0
"""Seconds for which the cost of a machine that has ended is not worked out again."""


class Allotments(LedgerFile):
    """The table ``allotments``. A scope is ``month:2026-11``, in which all machines count, or any
    other word, such as ``notebook:PATH``, in which those count that were allotted a share of it.

    Nothing has to be released: what a living machine holds is its share, or what it has cost if
    that is more; of one that has ended only what it has cost.
    """

    def costs(
        self, machine_id: str | None = None, *, since: float = 0.0, until: float | None = None
    ) -> Costs:
        """See :class:`Ledger`."""
        raise NotImplementedError

    def allot(self, machine_id: str, limits: Mapping[str, int], wanted: int) -> int:
        """Hold up to ``wanted`` micro-USD for a machine in each of the scopes, in place of what it
        held there; gives how much that is: ``limits`` are the most that all machines of a scope
        may cost together. All in one transaction, so machines that ask at once share what is
        left."""
        with self._transaction():
            granted = wanted
            for scope, limit in limits.items():
                spent, held = self._use(scope, without=machine_id)
                granted = min(granted, limit - spent - held)
            granted = max(0, granted)
            self._connection.executemany(
                "INSERT INTO allotments (machine_id, scope, amount, at) VALUES (?, ?, ?, ?)"
                " ON CONFLICT DO UPDATE SET amount = excluded.amount, at = excluded.at",
                [(machine_id, scope, granted, time.time()) for scope in limits],
            )
        return granted

    def scope_use(self, scope: str, *, without: str = "") -> tuple[int, int]:
        """What was really spent in a scope, and what living machines hold of it beyond that; both
        in micro-USD, and of all machines but the one with the id ``without``."""
        return self._use(scope, without)

    @functools.cached_property
    def _ended(self) -> dict[tuple[str, str], tuple[float, int]]:
        """What machines that have ended cost in a scope, and when that was found out: only a bill
        can change it, and to work out a month with hundreds of machines takes a second."""
        return {}

    def _use(self, scope: str, without: str = "") -> tuple[int, int]:
        now = time.time()
        since, until = _month(scope) if scope.startswith(_MONTH) else (0.0, now)
        rows = self._read(
            "SELECT id, amount, stopped_at FROM machines"
            " LEFT JOIN allotments ON machine_id = id AND scope = ?1"
            " WHERE id <> ?2 AND (amount IS NOT NULL OR ?3)"
            " AND (stopped_at IS NULL OR stopped_at > ?4)",
            (scope, without, scope.startswith(_MONTH), since),
        )
        spent = held = 0
        for machine, amount, stopped in rows:
            known = self._ended.get((scope, machine)) if stopped is not None else None
            if known is not None and now - known[0] < _REMEMBERED:
                cost = known[1]
            else:
                cost = self.costs(machine, since=since, until=min(until, now)).best.total
                if stopped is not None:
                    self._ended[scope, machine] = now, cost
            spent += cost
            if stopped is None and amount is not None:
                held += max(0, amount - cost)
        return spent, held


def _month(scope: str) -> tuple[float, float]:
    """Begin and end of ``month:2026-11`` in local time."""
    year, _, month = scope.removeprefix(_MONTH).partition("-")
    begin, end = ((int(year), int(month) + add, 1, 0, 0, 0, 0, 0, -1) for add in (0, 1))
    return time.mktime(begin), time.mktime(end)
