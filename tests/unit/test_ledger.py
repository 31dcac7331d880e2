"""The ledger within one process."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlinfra_sdk.errors import LedgerError
from mlinfra_sdk.ledger import Cost, Ledger, Price
from mlinfra_sdk.ledger.attribution import attribute
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


@given(
    st.integers(0, 50_000_000),
    st.floats(0, 500),
    st.floats(0, 800),
    st.lists(spans, max_size=12),
    st.floats(0, 1000),
    st.floats(0, 1000),
)
def test_runs_and_idle_add_up_to_the_machine_always(
    price: int,
    started: float,
    length: float,
    works: list[tuple[float, float]],
    since: float,
    until: float,
) -> None:
    runs = [(number, begin, begin + span) for number, (begin, span) in enumerate(works)]
    cost = attribute(price, started, started + length, runs, since=since, until=until)
    assert cost.total == cost.idle + sum(cost.runs.values())
    assert min([cost.idle, cost.total, *cost.runs.values()]) >= 0
    assert cost.total == pytest.approx(price * cost.seconds / 3600, abs=1.01)


def test_runs_at_the_same_time_share() -> None:
    cost = attribute(3_600_000, 0, 10, [(1, 0, 6), (2, 2, 6)], since=0, until=100)
    assert cost == Cost(10_000, 4000, 10.0, {1: 4000, 2: 2000})


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
    ledger = Ledger.open(path)
    with pytest.raises(LedgerError, match="is damaged"):
        ledger.machines()
    ledger.close()


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
