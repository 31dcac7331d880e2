"""``mlinfra cost``: what was spent, as a table or as a file."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from mlinfra_sdk import units
from mlinfra_sdk.errors import MlinfraError, RequestError
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.ledger.report import GROUPS, Row, report
from mlinfra_sdk.spec import did_you_mean
from mlinfra_sdk.terminal import console, print_json

BASIS = (
    "estimate: machine time at the prices of its offer, in the steps in which its provider bills. "
    "billed: what providers' own billing says so far; `mlinfra sweep` asks them."
)
"""What the figures are."""
TABLES = ("machines", "runs", "charges", "transfers", "measurements")


def dispatch(options: argparse.Namespace) -> int:
    """Carry the command out; gives the exit status."""
    if options.by not in GROUPS:
        raise RequestError(
            f"--by {options.by} is not understood.{did_you_mean(options.by, GROUPS)}",
            hint=f"Accepted: {', '.join(GROUPS)}.",
        )
    if options.table:
        return _tables(options)
    since = moment(options.since)
    until = moment(options.until) if options.until else time.time()
    ledger = Ledger.open()
    try:
        rows = report(ledger, options.by, since=since, until=until)
    finally:
        ledger.close()
    if options.json:
        print_json({"basis": BASIS, "rows": [_plain(row) for row in rows]})
    elif options.output:
        export(rows, Path(options.output))
        print(f"{len(rows)} rows are in {options.output}.")
    else:
        show(rows)
    return 0


def _tables(options: argparse.Namespace) -> int:
    """The entries of a table of the ledger as they are."""
    if options.table not in TABLES:
        raise RequestError(
            f"--table {options.table} is not understood.{did_you_mean(options.table, TABLES)}",
            hint=f"Accepted: {', '.join(TABLES)}.",
        )
    with contextlib.closing(Ledger.open()) as ledger:
        entries: list[Any] = getattr(ledger, options.table)()
    rows = [_flat(msgspec.to_builtins(entry)) for entry in entries]
    if options.output:
        write(rows, Path(options.output))
        print(f"{len(rows)} rows are in {options.output}.")
    else:
        print_json(rows)
    return 0


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry without structure: ``price`` becomes ``price_micro_per_hour`` and so on."""
    flat: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, dict):
            flat |= {f"{key}_{name}": it for name, it in value.items()}
        else:
            flat[key] = value
    return flat


def moment(text: str) -> float:
    """Unix time of a local date (``2026-11-25``) or of a duration ago (``7d``)."""
    with suppress(ValueError):
        return time.mktime(time.strptime(text, "%Y-%m-%d"))
    try:
        return time.time() - units.parse_duration(text)
    except ValueError:
        raise RequestError(
            f"{text!r} is neither a date nor a duration.", hint="Write 2026-11-25, or 7d."
        ) from None


def show(rows: list[Row]) -> None:
    """A table with its sum."""
    from rich.table import Table

    out = console()
    if not rows:
        out.print("No machine has run in that time.")
        return
    table = Table(box=None, pad_edge=False, show_footer=True)
    for number, name in enumerate(rows[0].labels):
        table.add_column(name, footer="total" if number == 0 else "")
    table.add_column("estimate", justify="right", footer=units.format_usd(sum_of(rows, "cost")))
    told = [row.billed for row in rows if row.billed is not None]
    if told:
        table.add_column("billed", justify="right", footer=units.format_usd(sum(told)))
        table.add_column("best", justify="right", footer=units.format_usd(sum_of(rows, "best")))
    seconds = sum(row.seconds for row in rows)
    table.add_column("time", justify="right", footer=units.format_duration(seconds))
    table.add_column("runs", justify="right", footer=str(sum(row.runs for row in rows)))
    for row in rows:
        table.add_row(
            *map(str, row.labels.values()),
            units.format_usd(row.cost),
            *(_billed(row) if told else ()),
            units.format_duration(row.seconds),
            str(row.runs),
        )
    out.print(table)
    out.print(BASIS)


def sum_of(rows: list[Row], column: str) -> int:
    """Micro-USD of all rows."""
    return sum(getattr(row, column) for row in rows)


def _billed(row: Row) -> tuple[str, str]:
    told = "not yet" if row.billed is None else units.format_usd(row.billed)
    return told, units.format_usd(row.best)


def _plain(row: Row) -> dict[str, Any]:
    return {
        **row.labels,
        "usd": row.best / units.MICRO,
        "usd_estimate": row.cost / units.MICRO,
        "usd_billed": None if row.billed is None else row.billed / units.MICRO,
        "seconds": row.seconds,
        "runs": row.runs,
    }


def export(rows: list[Row], path: Path) -> None:
    """Write the rows of a report into a file; see :func:`write`."""
    write([_plain(row) for row in rows], path)


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows into a file whose ending says how; it appears whole or not at all."""
    form = _FORMS.get(path.suffix.lower())
    if form is None:
        raise RequestError(
            f"{path.name} does not say what kind of file it is to be.",
            hint=f"End its name in {', '.join(_FORMS)}.",
        )
    content = form(rows)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise MlinfraError(f"{path} cannot be written: {error.strerror}.") from error


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0] if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _json(rows: list[dict[str, Any]]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(rows), indent=2) + b"\n"


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise RequestError(
            "Parquet files need the package pyarrow.", hint="pip install pyarrow, or write a .csv."
        ) from None
    columns = [{key: str(it) if key == "run" else it for key, it in row.items()} for row in rows]
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(columns), sink)
    return sink.getvalue()


_FORMS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".csv": _csv,
    ".json": _json,
    ".parquet": _parquet,
}
