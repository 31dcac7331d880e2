from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlinfra_sdk import __version__, cli
from mlinfra_sdk.ledger import Ledger, Price
from mlinfra_sdk.spec import NOTEBOOK, SETTINGS


@pytest.fixture(autouse=True)
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    numbers = (signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def status_of(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("--version") == 0
    assert capsys.readouterr().out == f"mlinfra-sdk {__version__}\n"


def test_help_of_run_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("run", "--help") == 0
    printed = capsys.readouterr().out
    for name, setting in SETTINGS.items():
        if NOTEBOOK in setting.where:
            assert f"  {name} " in printed and setting.help in printed


@pytest.mark.parametrize("command", ["run", "status", "stop", "doctor"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(command, "--help") == 0
    assert f"usage: mlinfra {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "a.py", "idle"], "'idle' is not KEY=VALUE."),
        (["run", "a.py", "nonsense"], "'nonsense' is not KEY=VALUE."),
        (["run", "a.py", "isolat=yes"], "Did you mean 'isolate'?"),
        (["run", "a.py", "isolate"], "The script a.py cannot be read"),
        (["stop", "--all", "one"], "not allowed with"),
    ],
)
def test_usage(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(*words) == 2
    printed = capsys.readouterr()
    assert said in printed.err and not printed.out


def test_status_counts_the_cost_of_machines_that_have_ended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ledger = Ledger.open()
    price = Price(2_000_000, "test", "2026-01-01")
    machine = ledger.intend_machine(name="old", provider="local", price=price, at=1000.0)
    ledger.machine_started(machine, handle="{}", at=1000.0)
    ledger.machine_stopped(machine, reason="test", at=1000.0 + 1800)
    ledger.close()
    assert status_of("status") == 0
    printed = capsys.readouterr().out
    assert "No machine runs." in printed
    assert "$0.00 this month, $1.00 in all" in printed


def test_a_damaged_ledger_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "ledger.sqlite").write_bytes(b"not a database" * 100)
    assert status_of("status") == 1
    printed = capsys.readouterr().err
    assert printed.startswith("mlinfra: The ledger") and printed.count("\n") == 1
