"""The ledger's file and its statements.

One SQLite file in WAL mode, written by any number of processes at once. Every act is recorded
before it happens and closed after it, each by one atomic statement, so that a process killed at
any instant leaves a readable ledger which at worst holds an act that is still open.

A commit survives the death of the process at once, and that of the whole computer at the next
checkpoint (``synchronous=NORMAL``): that keeps a run's two commits far below a millisecond.
"""

from __future__ import annotations

import functools
import secrets
from typing import Any

import msgspec

from .allotments import Allotments
from .attribution import Cost, attribute
from .billing import Billing
from .file import moment
from .metering import Interval, Meter, spread
from .records import Machine, Price, Run


class Costs(msgspec.Struct, frozen=True):
    """The same time by what is believed: ``estimate`` is metered at the prices of the offers,
    ``billed`` what providers say of those machines that they have billed, ``best`` the bill where
    there is one, and the estimate where not."""

    estimate: Cost = Cost()
    billed: Cost = Cost()
    best: Cost = Cost()

    def __add__(self, other: Costs) -> Costs:
        return Costs(
            self.estimate + other.estimate, self.billed + other.billed, self.best + other.best
        )


_MACHINE_COLUMNS = (
    "id, name, provider, gpu, gpu_count, handle, price, price_source, price_date, "
    "granularity_s, minimum_s, intended_at, started_at, stopped_at, stop_reason"
)
_RUN_COLUMNS = ", ".join(Run.__struct_fields__)


class Ledger(Allotments, Billing):
    """An open ledger. Safe to use from several threads; every method raises only
    :class:`LedgerError`."""

    @functools.cached_property
    def id(self) -> str:
        """Ten hexadecimal digits with which the ids of its machines begin: by them a machine at a
        provider is known as one of this user on this computer."""
        with self._lock:
            found: str = self._read("SELECT id FROM ledger")[0][0]
        return found

    def intend_machine(
        self,
        *,
        name: str,
        provider: str,
        price: Price,
        gpu: str = "",
        gpu_count: int = 0,
        at: float | None = None,
        key: str = "",
    ) -> str:
        """Record that a machine is about to be launched, before it is; returns its id, which is
        ``key`` if one of ours was found that is not on record."""
        machine_id = key or self.id + secrets.token_hex(11)
        self._write(
            "INSERT INTO machines (id, name, provider, gpu, gpu_count, price, price_source,"
            " price_date, granularity_s, minimum_s, intended_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                machine_id,
                name,
                provider,
                gpu,
                gpu_count,
                price.micro_per_hour,
                price.source,
                price.date,
                price.granularity_s,
                price.minimum_s,
                moment(at),
            ),
        )
        return machine_id

    def machine_started(
        self, machine_id: str, *, handle: str = "", at: float | None = None
    ) -> None:
        """Record that the machine runs and costs since ``at``; ``handle`` is the provider's JSON
        to find it again (without secrets)."""
        self._write(
            "UPDATE machines SET started_at = ?, handle = ? WHERE id = ?",
            (moment(at), handle, machine_id),
        )

    def machine_stopped(self, machine_id: str, *, reason: str, at: float | None = None) -> None:
        """Record that the machine is gone since ``at``, but not before it began. Runs that were
        still open on it are closed as ``lost`` at that time. A machine that is already closed
        keeps its first end."""
        end = moment(at)
        with self._transaction():
            changed = self._connection.execute(
                "UPDATE machines SET stopped_at = max(?1, ifnull(started_at, ?1)), stop_reason = ?2"
                " WHERE id = ?3 AND stopped_at IS NULL",
                (end, reason, machine_id),
            ).rowcount
            if changed:
                self._connection.execute(
                    "UPDATE runs SET status = 'lost', seconds = max(0, ? - opened_at)"
                    " WHERE machine_id = ? AND seconds IS NULL",
                    (end, machine_id),
                )

    def machine_outlived(self, machine_id: str, *, reason: str, at: float | None = None) -> None:
        """Record that a machine ran until ``at`` although it was not believed to; it costs from
        the intent to launch it, if its start was not seen."""
        self._write(
            "UPDATE machines SET stopped_at = max(?1, ifnull(stopped_at, ?1)),"
            " started_at = ifnull(started_at, intended_at), stop_reason = ?2 WHERE id = ?3",
            (moment(at), reason, machine_id),
        )

    def sweep_begins(self, every: float) -> bool:
        """Whether providers were not asked for what runs within ``every`` seconds; if so, who has
        called this is going to."""
        return self._changed(
            "UPDATE ledger SET swept_at = ?1 WHERE abs(?1 - swept_at) >= ?2",
            (moment(None), every),
        )

    def open_run(
        self,
        machine_id: str,
        *,
        kind: str = "cell",
        notebook: str = "",
        cell: str = "",
        at: float | None = None,
        number: int | None = None,
    ) -> int:
        """Record that work is sent to a machine; returns the run's id, which is ``number`` if that
        is given."""
        return self._write(
            "INSERT INTO runs (id, machine_id, kind, notebook, cell, opened_at)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (number, machine_id, kind, notebook, cell, moment(at)),
        )

    def close_run(
        self,
        run_id: int,
        *,
        status: str,
        seconds: float,
        bytes_up: int = 0,
        bytes_down: int = 0,
    ) -> None:
        """Record how a run ended: ``done``, ``error``, ``interrupted`` or ``lost``. A run that is
        already closed stays as it is."""
        self._write(
            "UPDATE runs SET status = ?, seconds = ?, bytes_up = ?, bytes_down = ?"
            " WHERE id = ? AND seconds IS NULL",
            (status, seconds, bytes_up, bytes_down, run_id),
        )

    def machines(self, *, active: bool | None = None) -> list[Machine]:
        """Machines, oldest first: all, those not known to be stopped, or those stopped."""
        where = {None: "", True: "WHERE stopped_at IS NULL", False: "WHERE stopped_at IS NOT NULL"}
        return [
            Machine(
                id=row[0],
                name=row[1],
                provider=row[2],
                gpu=row[3],
                gpu_count=row[4],
                handle=row[5],
                price=Price(*row[6:11]),
                intended_at=row[11],
                started_at=row[12],
                stopped_at=row[13],
                stop_reason=row[14],
            )
            for row in self._read(
                f"SELECT {_MACHINE_COLUMNS} FROM machines {where[active]} ORDER BY intended_at, id"
            )
        ]

    def runs(self, machine_id: str | None = None, *, since: float = 0.0) -> list[Run]:
        """Runs opened at ``since`` or later, oldest first, of one machine or of all."""
        rows = self._read(
            f"SELECT {_RUN_COLUMNS} FROM runs WHERE opened_at >= ?1"
            " AND (?2 IS NULL OR machine_id = ?2) ORDER BY opened_at, id",
            (since, machine_id),
        )
        return [Run(**dict(zip(Run.__struct_fields__, row, strict=True))) for row in rows]

    def latest_runs(self, limit: int, before: tuple[float, int] | None = None) -> list[Run]:
        """At most ``limit`` runs, newest first; with ``before``, which is the (opened_at, id) of a
        run, those that come after it in this order."""
        opened_at, run_id = before or (float("inf"), 0)
        rows = self._read(
            f"SELECT {_RUN_COLUMNS} FROM runs WHERE (opened_at, id) < (?, ?)"
            " ORDER BY opened_at DESC, id DESC LIMIT ?",
            (opened_at, run_id, limit),
        )
        return [Run(**dict(zip(Run.__struct_fields__, row, strict=True))) for row in rows]

    def run(self, run_id: int) -> Run | None:
        """The run of this number."""
        rows = self._read(f"SELECT {_RUN_COLUMNS} FROM runs WHERE id = ?", (run_id,))
        return Run(**dict(zip(Run.__struct_fields__, rows[0], strict=True))) if rows else None

    def version(self) -> int:
        """Another number after each change by another connection; costs microseconds."""
        number: int = self._read("PRAGMA data_version")[0][0]
        return number

    def cost(
        self,
        machine_id: str | None = None,
        *,
        since: float = 0.0,
        until: float | None = None,
    ) -> Cost:
        """The estimate of :meth:`costs`: what is known while a machine runs."""
        return self.costs(machine_id, since=since, until=until).estimate

    def costs(
        self,
        machine_id: str | None = None,
        *,
        since: float = 0.0,
        until: float | None = None,
    ) -> Costs:
        """What one machine or all of them cost from ``since`` to ``until`` (default: now).

        The parts always add up: runs + idle = total. Time that several runs share is divided
        evenly between them. Idle is the wait from a machine's start to its first run, what billing
        in whole steps adds, and storage after the end.
        """
        end = moment(until)
        runs: dict[str, list[tuple[int, float, float, int]]] = {}
        for run_id, machine, opened, seconds, brought in self._read(
            "SELECT id, machine_id, opened_at, seconds, bytes_down FROM runs"
            " WHERE (?1 IS NULL OR machine_id = ?1)",
            (machine_id,),
        ):
            closed = end if seconds is None else opened + seconds
            runs.setdefault(machine, []).append((run_id, opened, closed, brought))
        intervals: dict[str, list[Interval]] = {}
        for machine, *interval in self._of("prices", "kind, since, until, rate", machine_id):
            intervals.setdefault(machine, []).append(Interval(*interval))
        moved: dict[str, list[tuple[float, int]]] = {}
        columns = "opened_at + ifnull(seconds, 0), bytes, direction"
        for machine, when, size, direction in self._of("transfers", columns, machine_id):
            if direction == "down":
                moved.setdefault(machine, []).append((when, size))
        bills: dict[str, int] = {}
        for machine, amount in self._of("charges", "amount", machine_id):
            if amount is not None:
                bills[machine] = bills.get(machine, 0) + amount
        result = Costs()
        for machine, *price, intended, started, stopped in self._read(
            "SELECT id, price, price_source, price_date, granularity_s, minimum_s, intended_at,"
            " started_at, stopped_at FROM machines WHERE (?1 IS NULL OR id = ?1)",
            (machine_id,),
        ):
            own = runs.get(machine, [])
            estimate = Cost()
            if started is not None:
                meter = Meter(
                    price=Price(*price),
                    started=started,
                    stopped=stopped,
                    intervals=intervals.get(machine, ()),
                )
                estimate = meter.costs(own, moved.get(machine, ()), since=since, until=end)
            billed, best = Cost(), estimate
            if machine in bills and stopped is not None:
                begin = intended if started is None else started
                last = max(stopped, begin + 1e-3)
                works = [(run, opened, closed) for run, opened, closed, _ in own]
                accrued = spread(bills[machine], begin, last)
                billed = best = attribute(accrued, begin, last, works, since=since, until=end)
            result += Costs(estimate, billed, best)
        return result

    def _of(self, table: str, columns: str, machine_id: str | None) -> list[tuple[Any, ...]]:
        return self._read(
            f"SELECT machine_id, {columns} FROM {table} WHERE ?1 IS NULL OR machine_id = ?1",
            (machine_id,),
        )
