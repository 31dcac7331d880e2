"""The ledger's tables, and how an older file is brought up to date.

Times are Unix seconds (UTC); money is micro-USD. No column holds source code, outputs,
environment variables or credentials: ``handle`` is what a provider needs to find a machine again,
and providers keep secrets out of it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from ..errors import LedgerError

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE machines (
            id             TEXT PRIMARY KEY,
            name           TEXT NOT NULL,           -- the user's name for it
            provider       TEXT NOT NULL,
            gpu            TEXT NOT NULL DEFAULT '', -- accelerator asked for, '' for none
            gpu_count      INTEGER NOT NULL DEFAULT 0,
            handle         TEXT NOT NULL DEFAULT '', -- provider's JSON to find it again
            price          INTEGER NOT NULL,        -- micro-USD per hour
            price_source   TEXT NOT NULL,           -- where the price was read
            price_date     TEXT NOT NULL,           -- and when (ISO date)
            intended_at    REAL NOT NULL,           -- written before launch is called
            started_at     REAL,                    -- when it began to cost; NULL: not known to run
            stopped_at     REAL,                    -- NULL: wanted, or believed alive
            stop_reason    TEXT NOT NULL DEFAULT ''
        )
        """,
        "CREATE INDEX machines_active ON machines (intended_at) WHERE stopped_at IS NULL",
        """
        CREATE TABLE runs (
            id         INTEGER PRIMARY KEY,
            machine_id TEXT NOT NULL REFERENCES machines (id),
            kind       TEXT NOT NULL,               -- cell, call, push, pull
            notebook   TEXT NOT NULL DEFAULT '',    -- file that it belongs to
            cell       TEXT NOT NULL DEFAULT '',    -- the cell's id in it
            opened_at  REAL NOT NULL,               -- written before anything is sent
            seconds    REAL,                        -- by the monotonic clock; NULL: still open
            status     TEXT NOT NULL DEFAULT 'open'
                       CHECK (status IN ('open', 'done', 'error', 'interrupted', 'lost')),
            bytes_up   INTEGER NOT NULL DEFAULT 0,
            bytes_down INTEGER NOT NULL DEFAULT 0
        )
        """,
        "CREATE INDEX runs_machine ON runs (machine_id, opened_at)",
    ),
)


def migrate(
    connection: sqlite3.Connection,
    path: Path,
    migrations: Sequence[Sequence[str]] = MIGRATIONS,
) -> None:
    """Bring the file to the newest schema in one transaction; other processes may do so too."""
    newest = len(migrations)
    if _version(connection, path, newest) == newest:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statements in migrations[_version(connection, path, newest) :]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {newest}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection, path: Path, newest: int) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > newest:
        raise LedgerError(
            f"The ledger {path} was written by a newer version of mlinfra "
            f"(schema {version}; this one knows {newest}).",
            hint="Upgrade with pip install -U mlinfra-sdk, or set MLINFRA_HOME to another folder.",
        )
    return version
