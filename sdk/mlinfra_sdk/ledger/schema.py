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
            cell       TEXT NOT NULL DEFAULT '',    -- a digest of its code
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
    (
        """
        CREATE TABLE ledger (
            id       TEXT NOT NULL,             -- machines' ids begin with it: whose they are
            swept_at REAL NOT NULL DEFAULT 0    -- when providers were last asked what runs
        )
        """,
        "INSERT INTO ledger (id) VALUES (lower(hex(randomblob(5))))",
        # The steps in which the provider bills, and the least; 0: it is not known to round.
        "ALTER TABLE machines ADD COLUMN granularity_s REAL NOT NULL DEFAULT 0",
        "ALTER TABLE machines ADD COLUMN minimum_s REAL NOT NULL DEFAULT 0",
        """
        CREATE TABLE prices (                       -- what changes or adds to machines.price
            machine_id TEXT NOT NULL REFERENCES machines (id),
            kind       TEXT NOT NULL CHECK (kind IN ('machine', 'storage', 'egress')),
            since      REAL NOT NULL,
            until      REAL,                        -- NULL: goes on, or until the next of its kind
            rate       INTEGER NOT NULL,            -- micro-USD per hour; egress: per 10^9 bytes
            source     TEXT NOT NULL,
            date       TEXT NOT NULL,
            PRIMARY KEY (machine_id, kind, since)
        )
        """,
        """
        CREATE TABLE charges (                      -- what the provider's own billing says
            machine_id  TEXT NOT NULL REFERENCES machines (id),
            kind        TEXT NOT NULL DEFAULT 'machine',
            asked_at    REAL NOT NULL,              -- written before the provider is asked
            recorded_at REAL,                       -- NULL: it has not said yet
            amount      INTEGER,                    -- micro-USD
            source      TEXT NOT NULL DEFAULT '',
            PRIMARY KEY (machine_id, kind),
            CHECK ((amount IS NULL) = (recorded_at IS NULL))
        )
        """,
        """
        CREATE TABLE transfers (                    -- data that moved beside any run
            id         INTEGER PRIMARY KEY,
            machine_id TEXT NOT NULL REFERENCES machines (id),
            direction  TEXT NOT NULL CHECK (direction IN ('up', 'down')),
            what       TEXT NOT NULL,               -- dataset, checkpoint, files ...
            opened_at  REAL NOT NULL,
            seconds    REAL,                        -- NULL: still open
            bytes      INTEGER NOT NULL DEFAULT 0
        )
        """,
        "CREATE INDEX transfers_machine ON transfers (machine_id, opened_at)",
        """
        CREATE TABLE measurements (
            id     INTEGER PRIMARY KEY,
            run_id INTEGER NOT NULL REFERENCES runs (id),
            name   TEXT NOT NULL,                   -- such as gpu_utilization, images_per_second
            value  REAL NOT NULL,
            unit   TEXT NOT NULL DEFAULT '',
            kind   TEXT NOT NULL CHECK (kind IN ('measured', 'sourced', 'estimated')),
            source TEXT NOT NULL DEFAULT '',        -- how it was measured, or where it was read
            at     REAL NOT NULL
        )
        """,
        "CREATE INDEX measurements_run ON measurements (run_id, name, at)",
        """
        CREATE TABLE allotments (                   -- the share of a budget that a machine holds
            machine_id TEXT NOT NULL REFERENCES machines (id),
            scope      TEXT NOT NULL,               -- such as month:2026-11
            amount     INTEGER NOT NULL,            -- micro-USD
            at         REAL NOT NULL,
            PRIMARY KEY (machine_id, scope)
        )
        """,
        "CREATE INDEX allotments_scope ON allotments (scope)",
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
