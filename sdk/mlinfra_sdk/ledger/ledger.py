"""The ledger's file and its statements.

One SQLite file in WAL mode, written by any number of processes at once. Every act is recorded
before it happens and closed after it, each by one atomic statement, so that a process killed at
any instant leaves a readable ledger which at worst holds an act that is still open.

A commit survives the death of the process at once, and that of the whole computer at the next
checkpoint (``synchronous=NORMAL``): that keeps a run's two commits far below a millisecond.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from .. import paths, units
from ..catalog import is_stale
from ..errors import LedgerError
from .attribution import Cost, attribute
from .schema import migrate

_BUSY_SECONDS = 10.0
_UNKNOWN = "unknown"


class Price(msgspec.Struct, frozen=True):
    """A rate, and why it is believed: where it was read and on which day (ISO date)."""

    micro_per_hour: int
    source: str
    date: str

    @classmethod
    def unknown(cls) -> Price:
        """What nobody states; it counts as nothing and is never shown as an amount."""
        return cls(0, _UNKNOWN, "")

    @property
    def known(self) -> bool:
        """Whether the rate is an amount."""
        return self.source != _UNKNOWN

    def describe(self) -> str:
        """``$1.10/h (modal.com, 2026-07-01)``, with ``stale`` if it is old."""
        if not self.known:
            return "price unknown"
        source = re.sub(r"^https?://([^/]+).*", r"\1", self.source).removeprefix("www.")
        age = ", stale" if is_stale(self.date) else ""
        return f"{units.format_usd(self.micro_per_hour)}/h ({source}, {self.date}{age})"


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One machine, from the intent to launch it to its end. Times are Unix seconds."""

    id: str
    name: str
    provider: str
    gpu: str
    gpu_count: int
    handle: str
    price: Price
    intended_at: float
    started_at: float | None
    stopped_at: float | None
    stop_reason: str


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of work on a machine. ``seconds`` is None while it is open."""

    id: int
    machine_id: str
    kind: str
    notebook: str
    cell: str
    opened_at: float
    seconds: float | None
    status: str
    bytes_up: int
    bytes_down: int


_MACHINE_COLUMNS = (
    "id, name, provider, gpu, gpu_count, handle, price, price_source, price_date, "
    "intended_at, started_at, stopped_at, stop_reason"
)
_RUN_COLUMNS = ", ".join(Run.__struct_fields__)


class Ledger:
    """An open ledger. Safe to use from several threads; every method raises only
    :class:`LedgerError`."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path | None = None) -> Ledger:
        """Open the ledger, creating it (0600) if needed. Default: this user's own."""
        try:
            path = path or paths.data_dir() / "ledger.sqlite"
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except OSError as error:
            raise LedgerError(
                f"The ledger cannot be created: {error}.",
                hint="Make its folder writable, or set MLINFRA_HOME to one that is.",
            ) from error
        with _explained(path):
            connection = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                _use_wal(connection)
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute("PRAGMA foreign_keys = ON")
                migrate(connection, path)
            except BaseException:
                connection.close()
                raise
        return cls(path, connection)

    def close(self) -> None:
        """Close the file; the ledger object is of no use afterwards."""
        with self._lock:
            self._connection.close()

    def intend_machine(
        self,
        *,
        name: str,
        provider: str,
        price: Price,
        gpu: str = "",
        gpu_count: int = 0,
        at: float | None = None,
    ) -> str:
        """Record that a machine is about to be launched, before it is; returns its new id."""
        machine_id = uuid.uuid4().hex
        self._write(
            "INSERT INTO machines (id, name, provider, gpu, gpu_count, price, price_source,"
            " price_date, intended_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                machine_id,
                name,
                provider,
                gpu,
                gpu_count,
                price.micro_per_hour,
                price.source,
                price.date,
                _now(at),
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
            (_now(at), handle, machine_id),
        )

    def machine_stopped(self, machine_id: str, *, reason: str, at: float | None = None) -> None:
        """Record that the machine is gone since ``at``. Runs that were still open on it are closed
        as ``lost`` at that time. A machine that is already closed keeps its first end."""
        end = _now(at)
        with self._lock, _explained(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                changed = self._connection.execute(
                    "UPDATE machines SET stopped_at = ?, stop_reason = ?"
                    " WHERE id = ? AND stopped_at IS NULL",
                    (end, reason, machine_id),
                ).rowcount
                if changed:
                    self._connection.execute(
                        "UPDATE runs SET status = 'lost', seconds = max(0, ? - opened_at)"
                        " WHERE machine_id = ? AND seconds IS NULL",
                        (end, machine_id),
                    )
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

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
            (number, machine_id, kind, notebook, cell, _now(at)),
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
                price=Price(*row[6:9]),
                intended_at=row[9],
                started_at=row[10],
                stopped_at=row[11],
                stop_reason=row[12],
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

    def cost(
        self,
        machine_id: str | None = None,
        *,
        since: float = 0.0,
        until: float | None = None,
    ) -> Cost:
        """What one machine or all of them cost from ``since`` to ``until`` (default: now).

        The parts always add up: runs + idle = total. Time that several runs share is divided
        evenly between them; the wait from a machine's start to its first run is idle time.
        """
        end = _now(until)
        runs: dict[str, list[tuple[int, float, float]]] = {}
        for run_id, machine, opened, seconds in self._read(
            "SELECT id, machine_id, opened_at, seconds FROM runs"
            " WHERE (?1 IS NULL OR machine_id = ?1)",
            (machine_id,),
        ):
            closed = end if seconds is None else opened + seconds
            runs.setdefault(machine, []).append((run_id, opened, closed))
        result = Cost()
        for machine, price, started, stopped in self._read(
            "SELECT id, price, started_at, stopped_at FROM machines"
            " WHERE started_at IS NOT NULL AND (?1 IS NULL OR id = ?1)",
            (machine_id,),
        ):
            alive_until = end if stopped is None else stopped
            result += attribute(
                price, started, alive_until, runs.get(machine, []), since=since, until=end
            )
        return result

    def _write(self, statement: str, values: tuple[Any, ...]) -> int:
        with self._lock, _explained(self.path):
            return self._connection.execute(statement, values).lastrowid or 0

    def _read(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self._lock, _explained(self.path):
            return self._connection.execute(statement, values).fetchall()


def _now(at: float | None) -> float:
    return time.time() if at is None else at


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to WAL. SQLite does not wait for other processes here, so this does."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into a :class:`LedgerError` that says what to do."""
    try:
        yield
    except sqlite3.IntegrityError as error:
        raise LedgerError(f"The ledger {path} refused an entry: {error}.") from error
    except sqlite3.Error as error:
        text = str(error)
        if "not a database" in text or "malformed" in text:
            message = f"The ledger {path} is damaged: {text}."
            hint = "Move the file away (keep it if its history matters); a new one will be made."
        elif "full" in text:
            message = f"The ledger {path} cannot be written: the disk is full."
            hint = "Free some space."
        elif "locked" in text or "busy" in text:
            message = f"The ledger {path} was busy for {_BUSY_SECONDS:g} s."
            hint = "Find the process that holds it (lsof), or try again."
        elif "readonly" in text or "unable to open" in text:
            message = f"The ledger {path} cannot be opened for writing: {text}."
            hint = "Make the file and its folder writable, or set MLINFRA_HOME to another folder."
        else:
            message = f"The ledger {path} cannot be read or written: {text}."
            hint = "Look at the disk that it lies on, or set MLINFRA_HOME to another folder."
        raise LedgerError(message, hint=hint) from error
