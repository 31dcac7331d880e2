"""The ledger between processes: at once, killed at any instant, without room or permission."""

from __future__ import annotations

import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlinfra_sdk.errors import LedgerError
from mlinfra_sdk.ledger import Ledger, Price

WRITER = """
import sys
from mlinfra_sdk.ledger import Ledger, Price
from pathlib import Path
path, rounds = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
ledger = Ledger.open(path)
number = 0
while number < rounds or rounds == 0:
    machine = ledger.intend_machine(name="m", provider="local", price=Price(10, "t", "2026-01-01"))
    ledger.machine_started(machine)
    for _ in range(3):
        run = ledger.open_run(machine)
        ledger.close_run(run, status="done", seconds=0.001)
    ledger.open_run(machine)
    ledger.machine_stopped(machine, reason="test")
    number += 1
    print(number, flush=True)
"""


def writer(path: Path, rounds: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(rounds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def go(process: subprocess.Popen[str]) -> None:
    """Let a writer begin that has imported everything."""
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_that_begin_together_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    processes = [writer(path, 40) for _ in range(4)]
    for process in processes:
        go(process)
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    ledger = Ledger.open(path)
    assert len(ledger.machines(active=False)) == 160
    statuses = [run.status for run in ledger.runs()]
    assert (statuses.count("done"), statuses.count("lost")) == (480, 160)
    ledger.close()


def test_a_process_killed_at_any_instant_leaves_a_consistent_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    seed = random.randrange(1 << 30)
    choose = random.Random(seed)
    reader = Ledger.open(path)
    finished = 0
    for _ in range(8):
        process = writer(path, 0)
        go(process)
        assert process.stdout is not None
        last = 0
        for _ in range(choose.randrange(1, 20)):
            last = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate(timeout=10)
        assert not errors, errors
        finished += max([last, *(int(line) for line in rest.split())])

        stopped = [m for m in reader.machines(active=False) if m.stop_reason == "test"]
        assert len(stopped) >= finished, f"seed {seed}"
        for machine in stopped:
            statuses = sorted(run.status for run in reader.runs(machine.id))
            assert statuses == ["done", "done", "done", "lost"], f"seed {seed}"
        for machine in reader.machines(active=True):
            assert len(reader.runs(machine.id)) <= 4
            reader.machine_stopped(machine.id, reason="swept")
            assert "open" not in {run.status for run in reader.runs(machine.id)}
    reader.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


KILLED_BEFORE_EACH_STATEMENT = """
import os, signal, sqlite3, sys
from pathlib import Path
from mlinfra_sdk.ledger import Ledger, Price

connect = sqlite3.connect

def die_before(statement):
    seen = 0
    def count(_):
        nonlocal seen
        seen += 1
        if seen == statement:
            os.kill(os.getpid(), signal.SIGKILL)
    def traced(*arguments, **options):
        connection = connect(*arguments, **options)
        connection.set_trace_callback(count)
        return connection
    sqlite3.connect = traced

def life(path):
    ledger = Ledger.open(path)
    machine = ledger.intend_machine(name="m", provider="local", price=Price(10, "t", "2026-01-01"))
    ledger.machine_started(machine)
    ledger.close_run(ledger.open_run(machine), status="done", seconds=0.5)
    ledger.open_run(machine)
    ledger.machine_stopped(machine, reason="test")

statement, killed = 0, True
while killed:
    statement += 1
    child = os.fork()
    if child == 0:
        die_before(statement)
        life(Path(sys.argv[1], f"{statement}.sqlite"))
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
print(statement)
"""


def test_a_process_killed_before_each_statement_leaves_what_was_done_so_far(tmp_path: Path) -> None:
    count = int(run_limited(KILLED_BEFORE_EACH_STATEMENT, None, str(tmp_path)))
    stages = []
    for statement in range(1, count + 1):
        ledger = Ledger.open(tmp_path / f"{statement}.sqlite")
        stage = (
            [
                (machine.started_at is not None, machine.stopped_at is not None)
                for machine in ledger.machines()
            ],
            [run.status for run in ledger.runs()],
        )
        ledger.close()
        if stage not in stages:
            stages.append(stage)
    assert stages == [
        ([], []),
        ([(False, False)], []),
        ([(True, False)], []),
        ([(True, False)], ["open"]),
        ([(True, False)], ["done"]),
        ([(True, False)], ["done", "open"]),
        ([(True, True)], ["done", "lost"]),
    ]


def run_limited(code: str, prepare: object, *arguments: str) -> str:
    """Run code in a process of its own after ``prepare`` there; returns what it printed."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        preexec_fn=prepare,  # type: ignore[arg-type]
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout


def test_no_room_is_explained_and_nothing_written_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger.open(path).close()

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    printed = run_limited(
        """if True:
        import sys
        from pathlib import Path
        from mlinfra_sdk.errors import LedgerError
        from mlinfra_sdk.ledger import Ledger, Price
        ledger = Ledger.open(Path(sys.argv[1]))
        machine = ledger.intend_machine(
            name="m", provider="local", price=Price(0, "", ""))
        written = 0
        try:
            while True:
                ledger.open_run(machine, notebook="n" * 500)
                written += 1
        except LedgerError as error:
            print(written)
            print(error)
        """,
        little_room,
        str(path),
    )
    written, message = printed.splitlines()
    assert "cannot be" in message and "disk" in message
    ledger = Ledger.open(path)
    assert len(ledger.runs()) == int(written) > 0
    ledger.open_run(ledger.machines()[0].id)
    ledger.close()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can reach, which ``tmp_path`` is not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_a_folder_without_permission_is_explained(open_folder: Path) -> None:
    folder = open_folder / "readonly"
    folder.mkdir()
    existing = folder / "ledger.sqlite"
    Ledger.open(existing).close()
    existing.chmod(0o444)
    folder.chmod(0o555)
    explain = """if True:
        import os, sys
        from pathlib import Path
        from mlinfra_sdk.errors import LedgerError
        from mlinfra_sdk.ledger import Ledger, Price
        if os.geteuid() == 0:
            os.setuid(65534)
        os.chdir(sys.argv[1])
        for name in ("ledger.sqlite", "new.sqlite"):
            try:
                ledger = Ledger.open(Path(name))
                ledger.intend_machine(name="m", provider="local", price=Price(0, "", ""))
            except LedgerError as error:
                print(error)
        """
    lines = run_limited(explain, None, str(folder)).splitlines()
    assert len(lines) == 2
    assert all("cannot be" in line and "writable" in line for line in lines)


def test_a_ledger_held_by_another_process_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger.open(path).close()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr("mlinfra_sdk.ledger.file._BUSY_SECONDS", 0.1)
    ledger = Ledger.open(path)
    with pytest.raises(LedgerError, match="was busy"):
        ledger.intend_machine(name="m", provider="local", price=Price(0, "", ""))
    holder.execute("COMMIT")
    ledger.intend_machine(name="m", provider="local", price=Price(0, "", ""))
    ledger.close()
    holder.close()
