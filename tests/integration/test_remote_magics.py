"""``%remote``, ``%%remote`` and their words, as a user meets them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from live import Notebook, until

Open = Callable[..., Notebook]


def test_status_before_and_after_the_first_cell(open_notebook: Open) -> None:
    notebook = open_notebook()
    assert "No machine yet" in notebook.run("%remote status").stdout
    assert notebook.run("%remote").stdout == notebook.run("%remote status").stdout
    notebook.remote("1")
    told = notebook.run("%remote status").stdout
    assert "hard stop: only the worker ends" in told
    assert "Machine local-" in told and "$0.00/h" in told and "idle for" in told
    assert re.search(r"eager_limit +64 MB", told)
    assert re.search(r"it stops by itself in 1\dm\S* without work \(idle\)", told)
    assert "stops in 45m" in notebook.run("%remote extend 45m").stdout
    assert re.search(r"stops in 4[45]m", notebook.run("%remote machines").stdout)


def test_settings_show_where_they_come_from(open_notebook: Open) -> None:
    notebook = open_notebook(MLINFRA_IDLE="20m")
    (notebook.work / "pyproject.toml").write_text('[tool.mlinfra]\neager_limit = "32MB"\n')
    rows = [row.split(None, 2) for row in notebook.run("%remote use quiet").stdout.splitlines()]
    settings = {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}
    assert settings["idle"] == ("20m", "the environment variable MLINFRA_IDLE")
    assert settings["quiet"] == ("yes", "%remote use")
    assert settings["time"] == ("none", "default")
    (limit,) = [row[2] for row in rows if row[0] == "eager_limit"]
    assert "pyproject.toml" in limit
    assert notebook.remote("1").cards == []
    assert notebook.run("%remote use quiet=").stdout
    assert notebook.remote("1").cards


def test_stop_and_restart(notebook: Notebook) -> None:
    notebook.run("kept = 1")
    notebook.remote("import os, sys; sys.there = True; first = os.getpid()")
    assert "has a fresh kernel" in notebook.run("%remote restart").stdout
    assert notebook.remote("hasattr(sys, 'there'), kept").result == "(False, 1)"
    (agent,) = notebook.agents()
    assert "is stopped" in notebook.run("%remote stop").stdout
    until(lambda: not notebook.agents() and not notebook.workers(), "the machine's end")
    assert notebook.machines() == []
    assert "no machine" in notebook.run("%remote stop").stdout
    assert "no machine" in notebook.run("%remote restart").stdout
    assert notebook.remote("kept").result == "1"
    assert [process.pid for process in notebook.agents()] != [agent.pid]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("%remote frob", ["'frob'", "status", "restart"]),
        ("%%remote gpuu=1\n1", ["'gpuu'", "'gpu'", "Known keys"]),
        ("%%remote idle=soon\n1", ["idle=soon", "15m"]),
        ("%%remote gpu=A10:x\n1", ["gpu=A10:x", "gpu=A10"]),
        ("%%remote on=mars\n1", ["on=mars", "local"]),
        ("%%remote eager_limit=many\n1", ["eager_limit=many", "64MB"]),
        ("%%remote gpu = A10\n1", ["gpu=A10", "without spaces"]),
        ("%%remote 'quiet\n1", ["quiet", "quotes"]),
        ("%%remote quiet quiet\n1", ["quiet", "twice"]),
        ("%%remote gpu=H100:8\n1", ["gpu=H100:8", "local has none"]),
        ("%%remote gpu=H100:8 on=local\n1", ["gpu=H100:8", "on=local"]),
        ("%remote use idle=-5m", ["idle=-5m", "15m"]),
        ("%remote pull nothing", ["'nothing'"]),
        ("%remote pull", ["name of a variable"]),
        ("%remote stop nobody", ["'nobody'", "Running:"]),
    ],
)
def test_mistakes_are_named(notebook: Notebook, code: str, words: list[str]) -> None:
    cell = notebook.fail(code)
    assert cell.kinds == ["error"]
    assert [word for word in words if word not in cell.error[1]] == []
    assert "Traceback" not in cell.traceback


def test_help(notebook: Notebook) -> None:
    (page,) = notebook.run("%%remote?").reply["payload"]
    assert "[KEY=VALUE ...]" in page["data"]["text/plain"]
    assert "eager_limit" in page["data"]["text/plain"]
    (page,) = notebook.run("%remote?").reply["payload"]
    assert "restart" in page["data"]["text/plain"]


def test_completion(notebook: Notebook) -> None:
    notebook.run("valuable = 1")
    assert "gpu=" in notebook.complete("%%remote g")
    assert notebook.complete("%remote rest") == ["restart"]
    assert "valuable" in notebook.complete("%%remote\nvaluab")


def test_a_machine_shared_by_two_notebooks(open_notebook: Open) -> None:
    one = open_notebook("one")
    two = open_notebook("two", home=one.home)
    line = "%%remote machine=shared\n"
    one.run("x = 'one'")
    two.run("x = 'two'")
    assert one.run(line + "import sys; sys.mark = x\nx").result == "'one'"
    # The machine is the same, each notebook has a kernel of its own on it.
    assert two.run(line + "import sys; (x, hasattr(sys, 'mark'))").result == "('two', False)"
    assert len(one.machines()) == 1
    assert "shared" in two.run("%remote machines").stdout
    assert one.run(line + "sys.mark").result == "'one'"
    two.run(line + "print('busy')")
    assert "shared is stopped" in two.run("%remote stop").stdout
    again = one.run(line + "x")
    assert again.result == "'one'"
    assert "had ended" in str(again.cards[-1]["content"])
    one.run("%remote stop")


def test_a_named_machine_outlives_its_notebook(open_notebook: Open) -> None:
    notebook = open_notebook()
    line = "%%remote machine=lasting\n"
    notebook.run(line + "1")
    (agent,) = notebook.agents()
    notebook.restart()
    assert agent.is_running()
    assert "lasting" in notebook.run("%remote machines").stdout
    assert notebook.run(line + "'x' in dir()").result == "False"
    assert [process.pid for process in notebook.agents()] == [agent.pid]
    notebook.run("%remote stop lasting")


def test_loading_twice_changes_nothing(notebook: Notebook) -> None:
    notebook.run("%load_ext jupyter_mlinfra")
    notebook.run("%reload_ext jupyter_mlinfra")
    cell = notebook.fail("%%remote\n1/0")
    assert cell.kinds == ["error"]


def test_inside_other_code(notebook: Notebook) -> None:
    notebook.run("def run(code): get_ipython().run_cell_magic('remote', 'quiet', code)")
    cell = notebook.run("for i in range(3):\n    run(f'print({i}); last = {i}')\nlast")
    assert (cell.stdout, cell.result) == ("0\n1\n2\n", "2")
