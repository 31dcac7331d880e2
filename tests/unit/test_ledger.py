"""The ledger within one process."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlinfra_sdk.errors import LedgerError
from mlinfra_sdk.ledger import Charge, Cost, Ledger, Measurement, Price
from mlinfra_sdk.ledger.metering import Interval, Meter
from mlinfra_sdk.ledger.schema import MIGRATIONS, migrate

PRICE = Price(3_600_000, "tests", "2026-01-01")  # 1000 micro-USD per second


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    ledger = Ledger.open(path)
    yield ledger
    ledger.close()


def machine(ledger: Ledger, at: float = 1000.0) -> str:
    machine_id = ledger.intend_machine(name="m", provider="local", price=PRICE, at=at - 10)
    ledger.machine_started(machine_id, handle='{"pid": 1}', at=at)
    return machine_id


def test_a_machine_from_intent_to_end(ledger: Ledger) -> None:
    machine_id = ledger.intend_machine(
        name="train", provider="local", price=PRICE, gpu="A10", gpu_count=2, at=5.0
    )
    (intended,) = ledger.machines(active=True)
    assert (intended.id, intended.name, intended.provider) == (machine_id, "train", "local")
    assert (intended.gpu, intended.gpu_count, intended.price) == ("A10", 2, PRICE)
    assert (intended.intended_at, intended.started_at, intended.stopped_at) == (5.0, None, None)
    assert ledger.cost(until=100.0) == Cost()

    ledger.machine_started(machine_id, handle="{}", at=7.0)
    (started,) = ledger.machines()
    assert (started.started_at, started.handle) == (7.0, "{}")

    ledger.machine_stopped(machine_id, reason="idle", at=17.0)
    ledger.machine_stopped(machine_id, reason="again", at=99.0)
    (stopped,) = ledger.machines(active=False)
    assert (stopped.stopped_at, stopped.stop_reason) == (17.0, "idle")
    assert ledger.machines(active=True) == []
    assert ledger.cost(machine_id, until=100.0) == Cost(10_000, 10_000, 10.0, {})


def test_a_launch_that_failed_costs_nothing(ledger: Ledger) -> None:
    machine_id = ledger.intend_machine(name="m", provider="local", price=PRICE, at=0.0)
    ledger.machine_stopped(machine_id, reason="launch failed", at=50.0)
    assert ledger.cost(until=100.0) == Cost()


def test_runs_and_what_they_cost(ledger: Ledger) -> None:
    machine_id = machine(ledger, at=1000.0)
    first = ledger.open_run(machine_id, notebook="a.ipynb", cell="c1", at=1002.0)
    (run,) = ledger.runs()
    assert (run.status, run.seconds, run.notebook, run.cell) == ("open", None, "a.ipynb", "c1")
    assert ledger.cost(until=1005.0).runs == {first: 3000}
    ledger.close_run(first, status="done", seconds=4.0, bytes_up=10, bytes_down=20)
    second = ledger.open_run(machine_id, kind="pull", at=1008.0)
    ledger.close_run(second, status="error", seconds=1.0)
    runs = ledger.runs(machine_id)
    assert [(r.id, r.kind, r.status, r.seconds) for r in runs] == [
        (first, "cell", "done", 4.0),
        (second, "pull", "error", 1.0),
    ]
    assert (runs[0].bytes_up, runs[0].bytes_down) == (10, 20)
    assert [r.id for r in ledger.runs(since=1005.0)] == [second]
    assert ledger.runs("another") == []
    expected = Cost(10_000, 5000, 10.0, {first: 4000, second: 1000})
    assert ledger.cost(until=1010.0) == expected
    assert ledger.cost(machine_id, until=1010.0) == expected
    assert ledger.cost("another") == Cost()


def test_a_closed_run_stays_as_it_is(ledger: Ledger) -> None:
    run = ledger.open_run(machine(ledger))
    ledger.close_run(run, status="done", seconds=1.0)
    ledger.close_run(run, status="error", seconds=2.0)
    assert [(r.status, r.seconds) for r in ledger.runs()] == [("done", 1.0)]


def test_the_end_of_a_machine_closes_its_open_runs(ledger: Ledger) -> None:
    one, other = machine(ledger, at=0.0), machine(ledger, at=0.0)
    for machine_id in (one, other):
        ledger.open_run(machine_id, at=5.0)
    ledger.machine_stopped(one, reason="killed", at=9.0)
    assert [(r.status, r.seconds) for r in ledger.runs(one)] == [("lost", 4.0)]
    assert [(r.status, r.seconds) for r in ledger.runs(other)] == [("open", None)]


def test_costs_of_several_machines_add_up_over_a_span(ledger: Ledger) -> None:
    one, other = machine(ledger, at=0.0), machine(ledger, at=50.0)
    ledger.machine_stopped(one, reason="done", at=80.0)
    run = ledger.open_run(other, at=90.0)
    whole = ledger.cost(until=100.0)
    assert (whole.total, whole.seconds) == (130_000, 130.0)
    assert whole.runs == {run: 10_000}
    parts = ledger.cost(until=60.0) + ledger.cost(since=60.0, until=100.0)
    assert parts == whole


def test_entries_without_a_machine_or_with_a_wrong_status_are_refused(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="refused"):
        ledger.open_run("nobody")
    run = ledger.open_run(machine(ledger))
    with pytest.raises(LedgerError, match="refused"):
        ledger.close_run(run, status="fine", seconds=1.0)


def test_several_threads_write_at_once(ledger: Ledger) -> None:
    machine_id = machine(ledger)

    def work() -> None:
        for _ in range(50):
            ledger.close_run(ledger.open_run(machine_id), status="done", seconds=0.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({run.id for run in ledger.runs() if run.status == "done"}) == 200


spans = st.tuples(st.floats(0, 1000), st.floats(0, 500))
rates = st.integers(0, 50_000_000)


@given(
    price=st.builds(
        Price,
        rates,
        st.just("tests"),
        st.just("2026-01-01"),
        st.sampled_from([0.0, 1.0, 60.0, 3600.0]),
        st.sampled_from([0.0, 60.0, 600.0]),
    ),
    started=st.floats(0, 500),
    length=st.floats(0.001, 800),
    works=st.lists(st.tuples(spans, st.integers(0, 10**12)), max_size=12),
    changes=st.lists(
        st.builds(
            Interval,
            st.sampled_from(["machine", "storage", "egress"]),
            st.floats(0, 1500),
            st.none() | st.floats(1500, 3000),
            rates,
        ),
        max_size=5,
    ),
    transferred=st.lists(st.tuples(st.floats(0, 1500), st.integers(0, 10**12)), max_size=3),
    since=st.floats(0, 1000),
    until=st.floats(0, 1000),
)
def test_runs_and_idle_add_up_to_the_machine_always(
    price: Price,
    started: float,
    length: float,
    works: list[tuple[tuple[float, float], int]],
    changes: list[Interval],
    transferred: list[tuple[float, int]],
    since: float,
    until: float,
) -> None:
    runs = [
        (number, begin, begin + span, size)
        for number, ((begin, span), size) in enumerate(works, start=1)
    ]
    meter = Meter(price=price, started=started, stopped=started + length, intervals=changes)
    cost = meter.costs(runs, transferred, since=since, until=until)
    assert cost.total == cost.idle + sum(cost.runs.values())
    assert min([cost.idle, cost.total, *cost.runs.values()]) >= 0
    if until > since:  # parts of a span add up to it
        middle = (since + until) / 2
        parts = [
            meter.costs(runs, transferred, since=begin, until=end)
            for begin, end in ((since, middle), (middle, until))
        ]
        assert sum(part.total for part in parts) == cost.total


def test_runs_at_the_same_time_share() -> None:
    meter = Meter(price=PRICE, started=0, stopped=10)
    cost = meter.costs([(1, 0, 6, 0), (2, 2, 6, 0)], [], since=0, until=100)
    assert cost == Cost(10_000, 4000, 10.0, {1: 4000, 2: 2000})


@pytest.mark.parametrize(
    ("granularity", "minimum", "seconds", "billed"),
    [
        (0.0, 0.0, 61.5, 61.5),
        (1.0, 0.0, 61.5, 62.0),
        (1.0, 0.0, 62.0, 62.0),
        (60.0, 0.0, 61.5, 120.0),
        (3600.0, 0.0, 61.5, 3600.0),
        (1.0, 60.0, 3.2, 60.0),
        (1.0, 60.0, 75.2, 76.0),
    ],
)
def test_billing_goes_in_steps_and_has_a_minimum(
    ledger: Ledger, granularity: float, minimum: float, seconds: float, billed: float
) -> None:
    price = Price(3_600_000, "tests", "2026-01-01", granularity, minimum)
    it = ledger.intend_machine(name="m", provider="cloud", price=price, at=0.0)
    ledger.machine_started(it, at=1000.0)
    run = ledger.open_run(it, at=1001.0)
    ledger.close_run(run, status="done", seconds=1.0)
    ledger.machine_stopped(it, reason="idle", at=1000.0 + seconds)
    cost = ledger.cost(until=10_000.0)
    assert cost.total == billed * 1000
    assert cost.runs == {run: 1000}, "what the steps add is nobody's"
    assert cost.idle == (billed - 1) * 1000


def test_prices_change_while_a_machine_runs(ledger: Ledger) -> None:
    it = machine(ledger, at=1000.0)
    half = Price(1_800_000, "spot market", "2026-01-01")
    ledger.price_changed(it, half, at=1010.0)
    ledger.price_changed(it, PRICE, at=1030.0)
    ledger.price_changed(it, PRICE, at=1030.0)  # told twice
    ledger.machine_stopped(it, reason="idle", at=1040.0)
    assert ledger.cost(until=2000.0).total == (10 + 20 / 2 + 10) * 1000
    assert ledger.cost(since=1010.0, until=1030.0).total == 10_000


def test_a_disk_costs_when_its_machine_is_stopped_until_it_is_removed(ledger: Ledger) -> None:
    it = machine(ledger, at=1000.0)
    disk = Price(36_000, "disk", "2026-01-01")  # 10 micro-USD per second
    ledger.price_changed(it, disk, kind="storage", at=1000.0)
    ledger.machine_stopped(it, reason="stopped", at=1010.0)
    running = ledger.cost(until=1010.0)
    assert (running.total, running.seconds) == (10_100, 10.0)
    later = ledger.cost(since=1010.0, until=1110.0)
    assert (later.total, later.idle, later.seconds) == (1000, 1000, 0.0)
    ledger.price_ended(it, "storage", at=1110.0)
    assert ledger.cost(until=9999.0).total == 11_100


def test_what_leaves_a_machine_costs_where_it_is_priced(ledger: Ledger) -> None:
    it = machine(ledger, at=1000.0)
    per_gb = Price(90_000, "egress", "2026-01-01")
    ledger.price_changed(it, per_gb, kind="egress", at=1000.0)
    run = ledger.open_run(it, at=1001.0)
    ledger.close_run(run, status="done", seconds=1.0, bytes_up=10**9, bytes_down=2 * 10**9)
    moved = ledger.open_transfer(it, "down", "checkpoint", at=1003.0)
    assert [transfer.seconds for transfer in ledger.transfers(it)] == [None]
    for size in (10**9, 5):  # closed twice
        ledger.close_transfer(moved, size=size, seconds=2.0)
    up = ledger.open_transfer(it, "up", "dataset", at=1003.0)
    ledger.close_transfer(up, size=10**12, seconds=2.0)
    ledger.machine_stopped(it, reason="idle", at=1010.0)
    assert [(it.direction, it.what, it.bytes) for it in ledger.transfers()] == [
        ("down", "checkpoint", 10**9),
        ("up", "dataset", 10**12),
    ]
    cost = ledger.cost(until=2000.0)
    assert cost.runs == {run: 1000 + 180_000}
    assert cost.idle == 9000 + 90_000


def test_a_bill_is_recorded_once_and_kept_apart_from_the_estimate(ledger: Ledger) -> None:
    it, other = machine(ledger, at=1000.0), machine(ledger, at=1000.0)
    run = ledger.open_run(it, at=1000.0)
    ledger.close_run(run, status="done", seconds=5.0)
    for stopped in (it, other):
        ledger.machine_stopped(stopped, reason="idle", at=1010.0)
    assert ledger.ask_charge(it)
    assert not ledger.ask_charge(it, again_after=3600), "somebody has just asked"
    assert ledger.ask_charge(it)
    assert ledger.charged(it, 12_001, source="the bill", at=1.0)
    assert not ledger.charged(it, 999, source="the bill again")
    assert not ledger.ask_charge(it)
    (charge,) = ledger.charges()
    assert charge == Charge(
        machine_id=it,
        kind="machine",
        asked_at=charge.asked_at,
        recorded_at=1.0,
        amount=12_001,
        source="the bill",
    )
    costs = ledger.costs(until=2000.0)
    assert costs.estimate.total == 20_000
    assert (costs.billed.total, costs.billed.runs, costs.billed.idle) == (12_001, {run: 6000}, 6001)
    assert costs.best.total == 22_001
    assert ledger.costs(it, since=1000.0, until=1005.0).billed.total == 6000


def test_a_launch_that_failed_costs_what_is_billed_for_it(ledger: Ledger) -> None:
    it = ledger.intend_machine(name="m", provider="cloud", price=PRICE, at=0.0)
    ledger.machine_stopped(it, reason="launch failed", at=50.0)
    ledger.charged(it, 70, source="the bill")
    costs = ledger.costs(until=100.0)
    assert (costs.estimate.total, costs.best.total, costs.best.idle) == (0, 70, 70)


def test_a_machine_that_outlived_its_record_is_not_forgotten(ledger: Ledger) -> None:
    it = ledger.intend_machine(name="m", provider="cloud", price=PRICE, at=100.0)
    ledger.machine_stopped(it, reason="launch failed", at=101.0)
    ledger.machine_outlived(it, reason="it was still there", at=200.0)
    ledger.machine_outlived(it, reason="it was still there", at=150.0)
    assert ledger.cost(until=1000.0).total == 100_000


def test_a_machine_does_not_stop_before_it_began(ledger: Ledger) -> None:
    it = machine(ledger, at=1000.0)  # by a clock that was wrong
    ledger.machine_stopped(it, reason="idle", at=900.0)
    assert [found.stopped_at for found in ledger.machines()] == [1000.0]


def test_measurements_of_a_run(ledger: Ledger) -> None:
    run = ledger.open_run(machine(ledger))
    found = [
        Measurement(name="gpu_utilization", value=0.9, unit="1", source="NVML", at=5.0),
        Measurement(name="cost_per_epoch", value=0.1, unit="USD", kind="estimated", at=4.0),
    ]
    ledger.measure(run, found)
    with pytest.raises(LedgerError, match="refused"):
        ledger.measure(run, [found[0], Measurement(name="x", value=1.0, kind="guessed")])  # type: ignore[arg-type]
    assert [it.name for it in ledger.measurements(run)] == ["cost_per_epoch", "gpu_utilization"]
    (one,) = ledger.measurements(name="gpu_utilization")
    assert (one.run_id, one.value, one.kind, one.source) == (run, 0.9, "measured", "NVML")


def test_machines_carry_the_ledgers_own_mark(ledger: Ledger, tmp_path: Path) -> None:
    other = Ledger.open(tmp_path / "other.sqlite")
    again = Ledger.open(ledger.path)
    assert ledger.id == again.id != other.id
    assert machine(ledger).startswith(ledger.id)
    for it in (other, again):
        it.close()


def test_providers_are_asked_by_one_at_a_time(ledger: Ledger) -> None:
    assert [ledger.sweep_begins(600.0) for _ in range(3)] == [True, False, False]
    assert ledger.sweep_begins(0.0)


MONTH = "month:2026-11"


def test_a_budget_is_shared_and_no_money_is_promised_twice(ledger: Ledger) -> None:
    one, other, third = (
        ledger.intend_machine(name="m", provider="cloud", price=PRICE) for _ in range(3)
    )
    limits = {"notebook:a": 100_000}
    assert ledger.allot(one, limits, 60_000) == 60_000
    assert ledger.allot(other, limits, 60_000) == 40_000
    assert ledger.allot(third, limits, 60_000) == 0
    assert ledger.allot(other, {"notebook:b": 10_000}, 60_000) == 10_000, "another scope"
    assert ledger.scope_use("notebook:a") == (0, 100_000)
    ledger.machine_started(one, at=1000.0)
    ledger.machine_stopped(one, reason="idle", at=1005.0)  # 5000
    assert ledger.scope_use("notebook:a") == (5000, 40_000)
    assert ledger.allot(third, limits, 60_000) == 55_000
    assert ledger.allot(third, limits, 1000) == 1000, "in place of the share before"


def test_a_machine_holds_at_least_what_it_has_cost(ledger: Ledger) -> None:
    one, other = (ledger.intend_machine(name="m", provider="cloud", price=PRICE) for _ in range(2))
    limits = {"notebook:a": 100_000}
    ledger.allot(one, limits, 10_000)
    ledger.machine_started(one, at=time.time() - 50)
    granted = ledger.allot(other, limits, 100_000)
    assert 40_000 < granted <= 50_000


def test_a_month_counts_machines_without_a_share(ledger: Ledger) -> None:
    begin = time.mktime((2026, 11, 1, 0, 0, 0, 0, 0, -1))
    it = machine(ledger, at=begin - 10)
    ledger.machine_stopped(it, reason="idle", at=begin + 5)
    assert ledger.scope_use(MONTH) == (5000, 0)
    assert ledger.scope_use("month:2026-12") == (0, 0)
    next_one = ledger.intend_machine(name="m", provider="cloud", price=PRICE)
    assert ledger.allot(next_one, {MONTH: 8000, "notebook:a": 100_000}, 50_000) == 3000
    assert ledger.scope_use("notebook:a") == (0, 3000)


def test_the_file_belongs_to_the_user_alone(ledger: Ledger, path: Path) -> None:
    machine(ledger)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    files = list(path.parent.iterdir())
    assert path in files
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_the_place_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path / "x"))
    ledger = Ledger.open()
    ledger.close()
    assert ledger.path == tmp_path / "x" / "ledger.sqlite"


def test_a_damaged_file_is_explained(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database, but long enough to look at" * 50)
    with pytest.raises(LedgerError, match=r"ledger.sqlite is damaged.*Move the file away"):
        Ledger.open(path)


def test_a_file_damaged_later_is_explained(path: Path) -> None:
    ledger = Ledger.open(path)
    for _ in range(100):
        machine(ledger)
    ledger.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with (
        pytest.raises(LedgerError, match="is damaged"),
        contextlib.closing(Ledger.open(path)) as ledger,
    ):
        ledger.machines()


def test_a_newer_schema_is_explained_and_left_alone(path: Path) -> None:
    Ledger.open(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(LedgerError, match=r"newer version of mlinfra \(schema 99.*Upgrade"):
        Ledger.open(path)


def test_an_older_file_is_brought_up_to_date_at_once_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    connection = sqlite3.connect(path, isolation_level=None)
    migrate(connection, path)
    connection.execute(
        "INSERT INTO machines (id, name, provider, price, price_source, price_date, intended_at)"
        " VALUES ('a', 'm', 'local', 0, '', '', 1)"
    )
    column = "ALTER TABLE machines ADD COLUMN more TEXT"
    with pytest.raises(sqlite3.OperationalError):
        migrate(connection, path, (*MIGRATIONS, (column, "CREATE nonsense")))
    with pytest.raises(sqlite3.OperationalError):
        connection.execute("SELECT more FROM machines")
    migrate(connection, path, (*MIGRATIONS, (column,)))
    assert connection.execute("SELECT id, more FROM machines").fetchall() == [("a", None)]
    assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS) + 1,)
    connection.close()


def test_a_file_of_the_first_schema_keeps_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    connection = sqlite3.connect(path, isolation_level=None)
    migrate(connection, path, MIGRATIONS[:1])
    connection.execute(
        "INSERT INTO machines (id, name, provider, price, price_source, price_date, intended_at,"
        " started_at, stopped_at) VALUES ('a', 'm', 'local', 3600000, '', '', 1, 2, 3)"
    )
    connection.close()
    with contextlib.closing(Ledger.open(path)) as ledger:
        assert (ledger.cost().total, len(ledger.id)) == (1000, 10)


def test_a_full_database_is_explained_and_stays_readable(ledger: Ledger) -> None:
    machine_id = machine(ledger)
    ledger._connection.execute("PRAGMA max_page_count = 1")
    with pytest.raises(LedgerError, match=r"disk is full. Free some space"):
        for _ in range(10_000):
            ledger.open_run(machine_id)
    assert [m.id for m in ledger.machines()] == [machine_id]


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match=r"cannot be created.*MLINFRA_HOME"):
        Ledger.open(tmp_path / "file" / "ledger.sqlite")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_ledger_that_is_a_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot be opened"):
        Ledger.open(tmp_path)
