"""Reports divide what was spent; nothing is lost or counted twice."""

from __future__ import annotations

import contextlib
import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from mlinfra_sdk import cli, cli_cost
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.ledger import Ledger, Measurement, Price
from mlinfra_sdk.ledger.report import GROUPS, IDLE, report

PRICE = Price(3_600_000, "tests", "2026-01-01")  # 1000 micro-USD per second
NOON = time.mktime((2026, 3, 28, 12, 0, 0, 0, 0, -1))  # before Europe changes its clocks
DAY = 86400.0


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    it = Ledger.open(tmp_path / "ledger.sqlite")
    yield it
    it.close()


def add(
    ledger: Ledger,
    name: str,
    begin: float,
    end: float | None,
    runs: list[tuple[str, float, float | None]],
    provider: str = "local",
    bill: int | None = None,
    price: Price = PRICE,
) -> None:
    machine = ledger.intend_machine(name=name, provider=provider, price=price, at=begin)
    ledger.machine_started(machine, at=begin)
    for notebook, opened, seconds in runs:
        run = ledger.open_run(machine, notebook=notebook, at=opened)
        if seconds is not None:
            ledger.close_run(run, status="done", seconds=seconds)
    if end is not None:
        ledger.machine_stopped(machine, reason="idle", at=end)
    if bill is not None:
        ledger.charged(machine, bill, source="tests")


def test_each_report_names_who_caused_what(ledger: Ledger) -> None:
    add(ledger, "a", NOON, NOON + 100, [("x.ipynb", NOON + 10, 30.0), ("", NOON + 50, 20.0)])
    add(ledger, "b", NOON + 1, NOON + 11, [], provider="ssh")
    until = NOON + 1000

    def rows(by: str) -> list[tuple[object, ...]]:
        return [
            (*row.labels.values(), row.cost, row.seconds, row.runs)
            for row in report(ledger, by, until=until)
        ]

    assert rows("day") == [("2026-03-28", 110_000, 110.0, 2)]
    assert rows("machine") == [
        ("a", "local", "none", 100_000, 100.0, 2),
        ("b", "ssh", "none", 10_000, 10.0, 0),
    ]
    assert rows("provider") == [("local", 100_000, 100.0, 2), ("ssh", 10_000, 10.0, 0)]
    assert rows("notebook") == [
        (IDLE, 60_000, 0.0, 0),
        ("x.ipynb", 30_000, 30.0, 1),
        ("(none)", 20_000, 20.0, 1),
    ]
    assert [row[2:] for row in rows("run")] == [
        ("x.ipynb", "a", "cell", "done", 30_000, 30.0, 1),
        ("(none)", "a", "cell", "done", 20_000, 20.0, 1),
        (IDLE, "a", "", "", 50_000, 0.0, 0),
        (IDLE, "b", "", "", 10_000, 0.0, 0),
    ]


def test_days_are_local_and_may_be_cut(ledger: Ledger) -> None:
    add(ledger, "a", NOON, NOON + 2.5 * DAY, [("x", NOON + DAY, 60.0)])
    found = report(ledger, "day", since=NOON + 3600, until=NOON + 10 * DAY)
    assert [row.labels["day"] for row in found] == ["2026-03-28", "2026-03-29", "2026-03-30"]
    assert sum(row.seconds for row in found) == 2.5 * DAY - 3600
    assert [row.runs for row in found] == [0, 1, 0]


SPANS = st.tuples(st.floats(0, 3 * DAY), st.floats(0, DAY))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@example(machines=[((1.0, 0.0), True, [], None)], window=(0.0, 1.0))
@example(machines=[((1.0, 0.0), True, [], None)], window=(0.0, 2.0))
@given(
    machines=st.lists(
        st.tuples(
            SPANS,
            st.booleans(),
            st.lists(st.tuples(SPANS, st.sampled_from("xyz"))),
            st.none() | st.integers(0, 10**9),
        ),
        max_size=3,
    ),
    window=SPANS,
)
def test_rows_always_add_up_to_the_whole(
    tmp_path: Path,
    machines: list[
        tuple[tuple[float, float], bool, list[tuple[tuple[float, float], str]], int | None]
    ],
    window: tuple[float, float],
) -> None:
    steps = Price(3_600_000, "tests", "2026-01-01", 60.0, 600.0)
    (tmp_path / "all.sqlite").unlink(missing_ok=True)
    ledger = Ledger.open(tmp_path / "all.sqlite")
    for (begin, length), ends, runs, bill in machines:
        end = NOON + begin + length if ends else None
        made = [(name, NOON + opened, seconds) for (opened, seconds), name in runs]
        add(ledger, "m", NOON + begin, end, made, bill=bill, price=steps)
    since, until = NOON + window[0], NOON + sum(window)
    costs = ledger.costs(since=since, until=until)
    for by in GROUPS:
        rows = report(ledger, by, since=since, until=until)
        assert sum(row.cost for row in rows) == costs.estimate.total
        assert sum(row.billed or 0 for row in rows) == costs.billed.total
        assert sum(row.best for row in rows) == costs.best.total
    ledger.close()


def test_a_bill_stands_beside_the_estimate(
    ledger: Ledger, capsys: pytest.CaptureFixture[str]
) -> None:
    add(ledger, "a", NOON, NOON + 100, [("x.ipynb", NOON, 50.0)], bill=130_000)
    add(ledger, "b", NOON + 1, NOON + 11, [])
    rows = report(ledger, "machine", until=NOON + 1000)
    assert [(row.cost, row.billed, row.best) for row in rows] == [
        (100_000, 130_000, 130_000),
        (10_000, None, 10_000),
    ]
    cli_cost.show(rows)
    shown = capsys.readouterr().out
    assert "estimate" in shown and "$0.13" in shown and "not yet" in shown and "$0.14" in shown
    runs = report(ledger, "run", until=NOON + 1000)
    assert [(row.cost, row.billed) for row in runs] == [
        (50_000, 65_000),
        (50_000, 65_000),
        (10_000, None),
    ]


def test_exported_files_have_the_same_rows(ledger: Ledger, tmp_path: Path) -> None:
    add(ledger, "a", NOON, NOON + 100, [("ä, b.ipynb", NOON + 10, 30.0)])
    rows = report(ledger, "run", until=NOON + 1000)
    for name in ("cost.csv", "cost.json", "cost.parquet"):
        cli_cost.export(rows, tmp_path / name)
    with open(tmp_path / "cost.csv", newline="", encoding="utf-8") as file:
        from_csv = list(csv.DictReader(file))
    from_json = json.loads((tmp_path / "cost.json").read_text())
    from_parquet = parquet.read_table(tmp_path / "cost.parquet").to_pylist()
    for found in (from_csv, from_json, from_parquet):
        assert [float(row["usd"]) for row in found] == [0.03, 0.07]
        assert [row["notebook"] for row in found] == ["ä, b.ipynb", IDLE]
    assert sorted(it.name for it in tmp_path.glob("*cost*")) == [
        "cost.csv",
        "cost.json",
        "cost.parquet",
    ]
    with pytest.raises(RequestError, match="what kind of file"):
        cli_cost.export(rows, tmp_path / "cost.xls")


def test_when(ledger: Ledger) -> None:
    assert cli_cost.moment("2026-03-28") == NOON - DAY / 2
    assert abs(time.time() - cli_cost.moment("2h") - 7200) < 60
    with pytest.raises(RequestError, match="neither a date nor a duration"):
        cli_cost.moment("yesterday")


def test_the_ledgers_own_entries_are_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path))
    with contextlib.closing(Ledger.open()) as ledger:
        add(ledger, "a", NOON, NOON + 100, [("x.ipynb", NOON, 50.0)], bill=130_000)
        (run,) = ledger.runs()
        ledger.measure(run.id, [Measurement(name="speed", value=2.5, unit="1/s")])
        moved = ledger.open_transfer(run.machine_id, "up", "datasets")
        ledger.close_transfer(moved, size=10**9, seconds=8.0)
    expected = {
        "machines": ("price_micro_per_hour", 3_600_000),
        "runs": ("notebook", "x.ipynb"),
        "charges": ("amount", 130_000),
        "transfers": ("bytes", 10**9),
        "measurements": ("value", 2.5),
    }
    assert tuple(expected) == cli_cost.TABLES
    for table, (column, value) in expected.items():
        for ending in ("csv", "json", "parquet"):
            file = tmp_path / f"{table}.{ending}"
            with pytest.raises(SystemExit, match="0"):
                cli.main(["cost", "--table", table, "--output", str(file)])
        with open(tmp_path / f"{table}.csv", newline="", encoding="utf-8") as text:
            assert [row[column] for row in csv.DictReader(text)] == [str(value)]
        assert [it[column] for it in json.loads((tmp_path / f"{table}.json").read_text())] == [
            value
        ]
        (row,) = parquet.read_table(tmp_path / f"{table}.parquet").to_pylist()
        assert row[column] == value
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        cli.main(["cost", "--table", "charge"])
    assert "charges" in capsys.readouterr().err
