"""The commands for runs, with real scripts, machines and processes that are killed."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripts import LIMIT, Place, place

WAITING = """
import os, sys, time
print("begun", *sys.argv[1:])
while not os.path.exists("go"):
    time.sleep(0.02)
print("ended")
"""


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Place]:
    with place(tmp_path) as it:
        yield it


def runs(here: Place) -> list[dict[str, Any]]:
    done = here.mlinfra("runs", "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def detach(here: Place, code: str, *words: str, name: str = "train") -> None:
    here.write(f"{name}.py", code)
    done = here.mlinfra("run", f"{name}.py", "--detach", "--name", name, *words)
    assert done.returncode == 0, done.stderr
    assert f"mlinfra attach {name}" in done.stdout


def test_a_detached_script_is_shown_whole_and_kept_until_it_is_discarded(here: Place) -> None:
    code = "import sys\nprint('out')\nprint('err', file=sys.stderr)\nsys.exit(int(sys.argv[1]))"
    detach(here, code, "--", "7")
    waited = here.mlinfra("wait", "train")
    assert (waited.returncode, waited.stdout) == (1, "train has ended: error.\n")
    for words in (["attach"], ["attach", "train"]):
        shown = here.mlinfra(*words)
        assert (shown.returncode, shown.stdout) == (7, "out\n")
        first, last = shown.stderr.splitlines()
        assert first == "err" and "mlinfra cancel train" in last
    (run,) = runs(here)
    assert here.mlinfra("logs", run["id"]).stdout == "out\n"
    assert {key: run[key] for key in ("name", "status", "notebook", "title")} == {
        "name": "train",
        "status": "error",
        "notebook": "train.py",
        "title": "script('train.py', '7')",
    }
    assert here.mlinfra("cancel", "train").stdout == "train is discarded.\n"
    assert runs(here) == []
    assert here.mlinfra("runs").stdout.startswith("No run")


def test_ctrl_c_leaves_an_attached_run_running(here: Place) -> None:
    detach(here, WAITING, "--", "well")
    process = here.start("-m", "mlinfra_sdk.cli", "attach", "train")
    assert process.stdout is not None
    assert process.stdout.readline() == "begun well\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (130, "")
    assert "train goes on" in err and "mlinfra attach train" in err and "Traceback" not in err

    assert here.mlinfra("logs", "train").stdout == "begun well\n"
    (run,) = runs(here)
    assert run["status"] == "running" and run["ended_at"] is None
    assert "running" in here.mlinfra("runs").stdout

    following = here.start("-m", "mlinfra_sdk.cli", "logs", "train", "-f")
    assert following.stdout is not None
    assert following.stdout.readline() == "begun well\n"
    here.write("go", "")
    assert following.communicate(timeout=LIMIT)[0] == "ended\n"
    assert following.returncode == 0
    waited = here.mlinfra("wait", "train")
    assert (waited.returncode, waited.stdout) == (0, "train has ended: done.\n")
    assert here.mlinfra("attach").returncode == 0


def test_cancel_interrupts(here: Place) -> None:
    detach(here, WAITING)
    assert here.mlinfra("cancel", "train").stdout == "train is cancelled.\n"
    shown = here.mlinfra("attach", "train")
    assert shown.returncode == 130
    assert "KeyboardInterrupt" in shown.stderr


def test_what_a_killed_process_left_is_shown_and_its_variables_stay(here: Place) -> None:
    start = """
        import os, signal
        from mlinfra_sdk import Session
        from mlinfra_sdk.namespace.analysis import cell_names

        space = {"n": 6}
        session = Session(namespace=space, machine="big")
        code = "print('working')\\ntotal = n * 7\\ntotal"
        session.start(code, cell_names(code, space, code), count=1, label="train")
        os.kill(os.getpid(), signal.SIGKILL)
        """
    here.write("start.py", start)
    assert here.run("start.py").returncode == -signal.SIGKILL
    shown = here.mlinfra("attach", "train")
    assert (shown.returncode, shown.stdout) == (0, "working\n42\n")
    assert "%remote attach train" in shown.stderr
    assert [run["machine"] for run in runs(here)] == ["big"]

    collect = """
        from mlinfra_sdk import Session

        session = Session(namespace={}, machine="big")
        print(session.attach("train").value, session.namespace["total"])
        """
    assert here.script(collect) == "working\n42 42\n"
    assert runs(here) == []


def test_errors_of_a_cell_are_shown(here: Place) -> None:
    start = """
        from mlinfra_sdk import Session
        from mlinfra_sdk.namespace.analysis import cell_names

        session = Session(namespace={}, machine="big")
        session.start("1 / 0", cell_names("1 / 0", {}, "1 / 0"), count=1, label="train").wait()
        """
    here.script(start)
    shown = here.mlinfra("attach", "train")
    assert shown.returncode == 1
    assert "ZeroDivisionError: division by zero" in shown.stderr
    assert "\x1b[" not in shown.stderr


def test_a_run_is_named_by_its_label_or_its_id(here: Place) -> None:
    detach(here, "print(1)")
    detach(here, "print(2)")
    refused = here.mlinfra("attach", "train")
    ids = [run["id"] for run in runs(here)]
    assert refused.returncode == 2 and refused.stdout == ""
    assert all(it in refused.stderr for it in ids), refused.stderr
    assert {here.mlinfra("attach", it).stdout for it in ids} == {"1\n", "2\n"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["attach"], "There is no run."),
        (["logs", "train"], "There is no run 'train'."),
        (["cancel"], "NAME"),
        (["run", "script.py", "--name", "train"], "Add --detach."),
        (["run", "script.py", "--detach", "--name", "a b"], "is not understood"),
    ],
)
def test_errors_are_one_message(here: Place, words: list[str], said: str) -> None:
    here.write("script.py", "print(1)")
    done = here.mlinfra(*words)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
