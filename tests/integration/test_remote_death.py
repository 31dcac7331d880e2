"""Whatever dies: one clear error, no hang, the next cell works, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live import Cell, Notebook, gone, until

Open = Callable[..., Notebook]


def begin(notebook: Notebook, line: str = "%%remote") -> Cell:
    """Start a cell that does not end, and wait until it prints."""
    cell = notebook.start(f"{line}\nimport time\nprint('on', flush=True)\ntime.sleep(1000)")
    notebook.wait(lambda: cell.stdout or cell.done)
    assert not cell.done, cell.reply
    return cell


@pytest.mark.parametrize(
    ("dying", "word"),
    [
        ("import os; os._exit(3)", "status 3"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "out of memory"),
        ("import os; os.abort()", "SIGABRT"),
    ],
)
def test_the_remote_kernel_dies(notebook: Notebook, dying: str, word: str) -> None:
    notebook.run("mine = [1, 2, 3]")
    notebook.remote("theirs = (i for i in mine)\nmine.append(4)")
    cell = notebook.fail("%%remote\nprint('before', flush=True)\n" + dying)
    assert cell.kinds in (["error"], ["stdout", "error"])  # it may not have sent what it printed
    name, text = cell.error
    assert name == "KernelDied"
    assert word in text and "next run starts a fresh one" in text
    assert "Traceback" not in cell.traceback
    lost = notebook.fail("theirs.gi_frame")
    assert lost.error[0] == "RemoteValueLost"
    assert "theirs" in lost.error[1] and "Run the cell that made it again" in lost.error[1]
    assert notebook.remote("mine").result == "[1, 2, 3, 4]"


def test_it_dies_between_cells(notebook: Notebook) -> None:
    notebook.remote("kept = [5]\nstaying = (i for i in kept)")
    (worker,) = notebook.workers()
    worker.kill()
    until(lambda: gone(worker), "the kernel's end")
    notebook.wait(lambda: "lost" in notebook.evaluate("staying"))
    assert notebook.remote("sum(kept)").result == "5"
    assert notebook.fail("next(staying)").error[0] == "RemoteValueLost"


def test_it_dies_while_it_waits_for_input(notebook: Notebook) -> None:
    cell = notebook.start("%%remote\ninput('name? ')")
    notebook.wait(lambda: cell.prompts)
    (worker,) = notebook.workers()
    worker.kill()
    notebook._client.input("Ada")
    notebook.finish(cell)
    assert cell.error[0] == "KernelDied"
    assert notebook.remote("1 + 1").result == "2"


def test_the_agent_is_killed_while_a_cell_runs(open_notebook: Open) -> None:
    notebook = open_notebook()
    notebook.run("mine = [1]")
    notebook.remote("theirs = (i for i in mine)")
    cell = begin(notebook)
    (agent,) = notebook.agents()
    workers = notebook.workers()
    agent.kill()
    notebook.finish(cell)
    name, text = cell.error
    assert name == "MachineLost"
    assert "local-" in text and "next run starts another" in text
    until(lambda: all(map(gone, workers)), "its kernel to end")
    assert notebook.fail("next(theirs)").error[0] == "RemoteValueLost"
    assert notebook.remote("mine").result == "[1]"
    assert len(notebook.machines()) == 1
    # What the run had published is not lost with the agent.
    brought = notebook.fail("%remote attach")
    assert brought.stdout == "on\n"
    assert brought.error[0] == "MachineLost"


def test_the_agent_is_killed_while_idle(open_notebook: Open) -> None:
    notebook = open_notebook()
    notebook.run("mine = [1]")
    notebook.remote("mine.append(2)")
    (agent,) = notebook.agents()
    agent.kill()
    until(lambda: gone(agent), "the agent's end")
    again = notebook.remote("mine")
    assert again.result == "[1, 2]"
    assert "had ended" in str(again.cards[-1]["content"])
    assert len(notebook.machines()) == 1


@pytest.mark.parametrize(
    ("limits", "running"),
    [("idle=1s", False), ("time={soon}s", False), ("idle=1m time={soon}s", True)],
)
def test_the_local_kernel_is_killed(open_notebook: Open, limits: str, running: bool) -> None:
    notebook = open_notebook()
    begun = time.monotonic()
    notebook.remote("1")
    # The machine's time counts from its start, which takes as long as it takes.
    notebook.run(f"%remote use {limits.format(soon=int(time.monotonic() - begun) + 5)}")
    if running:
        begin(notebook)
    else:
        notebook.remote("2")
    notebook.kill()
    until(lambda: not notebook.processes(), "its machine to end", notebook.processes)
    # What is left on disk is cleared away by whoever looks next.
    other = open_notebook("other", home=notebook.home)
    assert "No machine runs." in other.run("%remote machines").stdout
    if running:  # its output waits for somebody to collect it
        assert other.fail("%remote attach").stdout == "on\n"
        other.run("%remote stop")
    assert other.machines() == []
    assert list(notebook.temporary.glob("mlinfra-*")) == []


def test_the_front_end_restarts_the_kernel(open_notebook: Open) -> None:
    notebook = open_notebook()
    notebook.remote("x = 1")
    (agent,) = notebook.agents()
    notebook.restart()
    until(lambda: gone(agent), "its machine to end")
    assert notebook.remote("'x' in dir()").result == "False"


def test_an_idle_machine_ends_and_is_replaced(open_notebook: Open) -> None:
    notebook = open_notebook()
    notebook.run("%remote use idle=1s")
    notebook.remote("x = [1]\ny = (i for i in x)")
    (agent,) = notebook.agents()
    until(lambda: gone(agent), "the idle machine to end")
    cell = notebook.remote("x.append(2)\nx")
    assert cell.result == "[1, 2]"
    note = str(cell.cards[-1]["content"])
    assert "had ended" in note and "idle" in note
    assert notebook.fail("next(y)").error[0] == "RemoteValueLost"


def test_work_keeps_an_idle_machine(open_notebook: Open) -> None:
    notebook = open_notebook()
    notebook.run("%remote use idle=1s")
    assert notebook.remote("import time\ntime.sleep(4)\n'worked'").result == "'worked'"


def test_a_broken_configuration_file(open_notebook: Open) -> None:
    notebook = open_notebook()
    file = notebook.folder / "config" / "mlinfra" / "config.toml"
    file.parent.mkdir(parents=True)
    file.write_text("idle = [[[")
    cell = notebook.fail("%%remote\n1")
    assert cell.error[0] == "RequestError"
    assert str(file) in cell.error[1]
    file.write_text('idel = "5m"')
    cell = notebook.fail("%%remote\n1")
    assert "idel" in cell.error[1] and "idle" in cell.error[1] and str(file) in cell.error[1]
    file.unlink()
    assert notebook.remote("1").result == "1"


def test_a_state_directory_that_cannot_be_written(open_notebook: Open, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file in its place")  # root may write anywhere, but not here
    notebook = open_notebook(home=home)
    cell = notebook.fail("%%remote\n1")
    assert str(home) in cell.error[1] and "MLINFRA_HOME" in cell.error[1]
    assert cell.error[0] == "StateError"
    assert "Traceback" not in cell.traceback
    home.unlink()
    assert notebook.remote("1").result == "1"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", "size=24m,mode=700", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("isolate", ["", "isolate env=none"])
def test_a_full_disk(open_notebook: Open, small_disk: Path, isolate: str) -> None:
    notebook = open_notebook(home=small_disk)
    line = f"%%remote {isolate}\n"
    notebook.run("import numpy; big = numpy.random.bytes(40_000_000); log = []")
    notebook.run(line + "log.append(len(log))")
    cell = notebook.fail(line + "len(big)")
    assert cell.error[0] == "StoreError"
    assert str(small_disk) in cell.error[1] and "space" in cell.error[1]
    code = "import numpy\nmade = numpy.random.bytes(40_000_000)\nlog.append(1)"
    there = notebook.run(line + code)
    assert "'made'" in str(there.cards[-1]["content"]) and "space" in str(
        there.cards[-1]["content"]
    )
    assert notebook.evaluate("log") == "[0, 1]"
    assert notebook.run(line + "len(made)").result == "40000000"


def test_a_read_only_state_directory(open_notebook: Open, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    notebook = open_notebook(home=small_disk)
    cell = notebook.fail("%%remote\n1")
    assert str(small_disk) in cell.error[1] and "Read-only" in cell.error[1]
    assert "MLINFRA_HOME" in cell.error[1]
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert notebook.remote("1").result == "1"


def test_a_signal_for_the_agent_ends_the_machine(open_notebook: Open) -> None:
    notebook = open_notebook()
    notebook.remote("1")
    (agent,) = notebook.agents()
    agent.send_signal(signal.SIGTERM)
    until(lambda: not notebook.workers() and not notebook.agents(), "agent and kernel to end")
    cell = notebook.remote("1 + 1")
    assert cell.result == "2"
    assert "stopped" in str(cell.cards[-1]["content"])
