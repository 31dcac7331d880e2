"""Of the ledger: what providers bill, prices that change, data that moved, and measurements."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Literal

from .file import LedgerFile, moment
from .records import Charge, Measurement, Price, Transfer

PriceKind = Literal["machine", "storage", "egress"]


class Billing(LedgerFile):
    """The tables ``prices``, ``charges``, ``transfers`` and ``measurements``."""

    # -- prices ------------------------------------------------------------------------------

    def price_changed(
        self,
        machine_id: str,
        price: Price,
        *,
        kind: PriceKind = "machine",
        at: float | None = None,
        until: float | None = None,
    ) -> None:
        """Record that the machine costs so much from ``at`` on, as spot prices change. Of kind
        ``storage`` it is what its disk costs on top, also when it is stopped, until ``until`` or
        :meth:`price_ended`; of kind ``egress`` the micro-USD for 10^9 bytes that it sends."""
        self._write(
            "INSERT INTO prices (machine_id, kind, since, until, rate, source, date)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET rate = excluded.rate, until = excluded.until,"
            " source = excluded.source, date = excluded.date",
            (
                machine_id,
                kind,
                moment(at),
                until,
                price.micro_per_hour,
                price.source,
                price.date,
            ),
        )

    def price_ended(self, machine_id: str, kind: PriceKind, *, at: float | None = None) -> None:
        """Record that this is not billed any longer, such as a disk that was removed."""
        self._write(
            "UPDATE prices SET until = ? WHERE machine_id = ? AND kind = ? AND until IS NULL",
            (moment(at), machine_id, kind),
        )

    # -- charges -----------------------------------------------------------------------------

    def ask_charge(
        self, machine_id: str, *, kind: str = "machine", again_after: float = 0.0
    ) -> bool:
        """Record that the provider is going to be asked what it has billed; False if it has said,
        or somebody asked less than ``again_after`` seconds ago."""
        now = time.time()
        return self._changed(
            "INSERT INTO charges (machine_id, kind, asked_at) VALUES (?1, ?2, ?3)"
            " ON CONFLICT DO UPDATE SET asked_at = ?3"
            " WHERE amount IS NULL AND abs(?3 - asked_at) >= ?4",
            (machine_id, kind, now, again_after),
        )

    def charged(
        self,
        machine_id: str,
        amount: int,
        *,
        source: str,
        kind: str = "machine",
        at: float | None = None,
    ) -> bool:
        """Record what the provider has billed, in micro-USD; False if that was known already,
        which stays as it is: nothing is charged twice."""
        now = moment(at)
        return self._changed(
            "INSERT INTO charges (machine_id, kind, asked_at, recorded_at, amount, source)"
            " VALUES (?1, ?2, ?3, ?3, ?4, ?5)"
            " ON CONFLICT DO UPDATE SET recorded_at = ?3, amount = ?4, source = ?5"
            " WHERE amount IS NULL",
            (machine_id, kind, now, amount, source),
        )

    def charges(self, machine_id: str | None = None) -> list[Charge]:
        """Of one machine or of all, those first that were asked for first."""
        rows = self._read(
            f"SELECT {', '.join(Charge.__struct_fields__)} FROM charges"
            " WHERE ?1 IS NULL OR machine_id = ?1 ORDER BY asked_at, machine_id, kind",
            (machine_id,),
        )
        return [Charge(**dict(zip(Charge.__struct_fields__, row, strict=True))) for row in rows]

    # -- transfers ---------------------------------------------------------------------------

    def open_transfer(
        self,
        machine_id: str,
        direction: Literal["up", "down"],
        what: str,
        *,
        at: float | None = None,
    ) -> int:
        """Record that data is going to move beside any run; gives the transfer's id."""
        return self._write(
            "INSERT INTO transfers (machine_id, direction, what, opened_at) VALUES (?, ?, ?, ?)",
            (machine_id, direction, what, moment(at)),
        )

    def close_transfer(self, transfer_id: int, *, size: int, seconds: float) -> None:
        """Record what has moved, in bytes. One that is closed stays as it is."""
        self._write(
            "UPDATE transfers SET bytes = ?, seconds = ? WHERE id = ? AND seconds IS NULL",
            (size, seconds, transfer_id),
        )

    def transfers(self, machine_id: str | None = None) -> list[Transfer]:
        """Of one machine or of all, oldest first."""
        rows = self._read(
            f"SELECT {', '.join(Transfer.__struct_fields__)} FROM transfers"
            " WHERE ?1 IS NULL OR machine_id = ?1 ORDER BY opened_at, id",
            (machine_id,),
        )
        return [Transfer(**dict(zip(Transfer.__struct_fields__, row, strict=True))) for row in rows]

    # -- measurements ------------------------------------------------------------------------

    def measure(self, run_id: int, found: Iterable[Measurement]) -> None:
        """Record figures about a run, all or none."""
        now = time.time()
        rows = [
            (
                run_id,
                it.name,
                it.value,
                it.unit,
                it.kind,
                it.source,
                now if it.at is None else it.at,
            )
            for it in found
        ]
        with self._transaction():
            self._connection.executemany(
                "INSERT INTO measurements (run_id, name, value, unit, kind, source, at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                rows,
            )

    def measurements(
        self, run_id: int | None = None, *, name: str | None = None
    ) -> list[Measurement]:
        """Of one run or of all, with one name or all, oldest first."""
        rows = self._read(
            f"SELECT {', '.join(Measurement.__struct_fields__)} FROM measurements"
            " WHERE (?1 IS NULL OR run_id = ?1) AND (?2 IS NULL OR name = ?2) ORDER BY at, id",
            (run_id, name),
        )
        names = Measurement.__struct_fields__
        return [Measurement(**dict(zip(names, row, strict=True))) for row in rows]
