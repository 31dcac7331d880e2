"""``mlinfra shell``: in a real terminal, on machines of several kinds."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from sshd import Sshd

from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request

COMMAND = [sys.executable, "-m", "mlinfra_sdk.cli", "shell"]
CHECK = ("echo answer $((40 + 2))", "tty -s && echo a terminal", "pwd", "exit 3")


def typed(*lines: str, words: tuple[str, ...] = ()) -> tuple[str, int]:
    """What a terminal shows when this is typed into a shell, and how the command ended."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *words], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    os.write(ours, "".join(f"{line}\n" for line in lines).encode())
    shown = b""
    with suppress(OSError):  # the other end of the terminal is closed
        while data := os.read(ours, 4096):
            shown += data
    os.close(ours)
    return shown.decode(errors="replace"), process.wait()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_a_shell_in_the_files_of_a_machine(home: Path) -> None:
    Path("data.txt").write_text("here")
    with Session(namespace={}, request=Request(isolate=True, env="none", machine="box")) as it:
        it.run("1")
        shown, status = typed("cat data.txt", *CHECK, words=("box",))
        it.stop()
    assert status == 3 and "answer 42" in shown and "a terminal" in shown
    assert f"{home}/machines/" in shown and "/workspaces/work" in shown and "here" in shown


def test_a_shell_by_ssh(warm_box: Sshd) -> None:
    with warm_box.known():
        request = Request(on="ssh:box", env="none", sync=False, machine="far")
        with Session(namespace={}, request=request) as it:
            it.run("1")
            shown, status = typed(*CHECK)
            it.stop()
    assert status == 3 and "answer 42" in shown and "a terminal" in shown
    assert str(warm_box.home) in shown


@pytest.mark.usefixtures("home")
def test_what_cannot_be_entered_says_so() -> None:
    done = subprocess.run(COMMAND, capture_output=True, text=True)
    assert done.returncode == 1 and "No machine runs." in done.stderr
    done = subprocess.run([*COMMAND, "gone"], capture_output=True, text=True)
    assert done.returncode == 1 and "No machine 'gone' runs." in done.stderr
