"""The ledger's file: opened with care, and its errors explained."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from mlinfra_sdk import paths
from mlinfra_sdk.errors import LedgerError

from .schema import migrate

L = TypeVar("L", bound="LedgerFile")

_BUSY_SECONDS = 10.0


class LedgerFile:
    """An open file. Safe to use from several threads; every method raises only
    :class:`LedgerError`."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._lock = threading.RLock()

    @classmethod
    def open(cls: type[L], path: Path | None = None) -> L:
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

    def _write(self, statement: str, values: tuple[Any, ...]) -> int:
        with self._lock, _explained(self.path):
            return self._connection.execute(statement, values).lastrowid or 0

    def _changed(self, statement: str, values: tuple[Any, ...]) -> bool:
        """Whether a statement has changed anything."""
        with self._lock, _explained(self.path):
            return self._connection.execute(statement, values).rowcount > 0

    def _read(self, statement: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self._lock, _explained(self.path):
            return self._connection.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Statements of which all or none are done, and which see nobody else's between them."""
        with self._lock, _explained(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")


def moment(at: float | None) -> float:
    """That instant, or now."""
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
