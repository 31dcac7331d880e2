"""An interrupt reaches the remote code, and what ignores it can still be ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from live import Cell, Notebook, until

LOOPS = {
    "sleep": "import time\nprint('on', flush=True)\nwhile True:\n    time.sleep(1)",
    "busy": "print('on', flush=True)\nwhile True:\n    pass",
    "await": "import asyncio\nprint('on', flush=True)\nawait asyncio.sleep(1000)",
    "shell": "print('on', flush=True)\n!sleep 1000",
    "bash": "%%bash\necho on\nsleep 1000",
    "subprocess": (
        "import subprocess\nprint('on', flush=True)\nsubprocess.run('sleep 1000'.split())"
    ),
    "native": "import threading\nprint('on', flush=True)\nthreading.Event().wait()",
}


def begin(notebook: Notebook, code: str) -> Cell:
    """Start a cell and wait until it prints."""
    cell = notebook.start("%%remote\n" + code)
    notebook.wait(lambda: cell.stdout or cell.done)
    assert not cell.done, cell.reply
    return cell


@pytest.mark.parametrize("kind", LOOPS)
def test_it_ends_the_cell_as_a_local_one(notebook: Notebook, kind: str) -> None:
    cell = begin(notebook, LOOPS[kind])
    if "sleep 1000" in LOOPS[kind]:
        until(lambda: sleepers(notebook), "the command to run")
    notebook.interrupt()
    notebook.finish(cell)
    # All as in a local kernel: IPython takes an interrupted `!` for ended, and %%bash has failed.
    if kind == "shell":
        assert cell.reply["status"] == "ok"
    else:
        names = {"await": "CancelledError", "bash": "CalledProcessError"}
        assert cell.error[0] == names.get(kind, "KeyboardInterrupt")
    until(lambda: not sleepers(notebook), "the cell's processes to end", lambda: sleepers(notebook))
    assert notebook.remote("1 + 1").result == "2"


def sleepers(notebook: Notebook) -> list[psutil.Process]:
    return [process for process in notebook.processes() if process.name() == "sleep"]


def test_input_can_be_interrupted(notebook: Notebook) -> None:
    cell = notebook.start("%%remote\ninput('name? ')")
    notebook.wait(lambda: cell.prompts)
    notebook.interrupt()
    notebook.finish(cell)
    assert cell.error[0] == "KeyboardInterrupt"
    assert notebook.remote("input('again? ')", answers=["here"]).result == "'here'"


def test_variables_and_outputs_until_then_are_kept(notebook: Notebook) -> None:
    notebook.run("log = []")
    code = "log.append(1)\nfresh = 'made'\nprint('on', flush=True)\nwhile True:\n    pass"
    cell = begin(notebook, code)
    notebook.interrupt()
    notebook.finish(cell)
    assert cell.stdout == "on\n"
    assert notebook.evaluate("(log, fresh)") == "([1], 'made')"


def test_a_handler_of_the_cell_sees_it(notebook: Notebook) -> None:
    code = (
        "import time\n"
        "try:\n"
        "    print('on', flush=True)\n"
        "    time.sleep(1000)\n"
        "except KeyboardInterrupt:\n"
        "    print('cleaned up')"
    )
    cell = begin(notebook, code)
    notebook.interrupt()
    notebook.finish(cell)
    assert cell.reply["status"] == "ok"
    assert cell.stdout == "on\ncleaned up\n"


STUBBORN = (
    "import time\n"
    "print('on', flush=True)\n"
    "while True:\n"
    "    try:\n"
    "        time.sleep(1000)\n"
    "    except KeyboardInterrupt:\n"
    "        print('no', flush=True)"
)


def test_a_cell_that_swallows_it_can_be_left_and_ended(
    open_notebook: Callable[..., Notebook],
) -> None:
    notebook = open_notebook()
    notebook.run("kept = [1, 2]")
    notebook.remote("len(kept)")
    cell = begin(notebook, STUBBORN)
    (before,) = notebook.workers()
    notebook.interrupt()
    notebook.wait(lambda: "no\n" in cell.stdout)
    notebook.wait(lambda: any("Interrupt again" in str(card["content"]) for card in cell.cards))
    notebook.interrupt()
    notebook.finish(cell)
    assert cell.error[0] == "KeyboardInterrupt"
    notebook.run("%remote restart")
    until(lambda: not before.is_running(), "the stubborn kernel to end")
    assert notebook.remote("sum(kept)").result == "3"


def test_a_left_cell_goes_on_being_shown_and_holds_nothing_up(
    open_notebook: Callable[..., Notebook],
) -> None:
    notebook = open_notebook()
    cell = begin(notebook, STUBBORN.replace("'no'", "'no' + 'x' * 10_000_000"))
    notebook.interrupt()
    notebook.wait(lambda: "no" in cell.stdout)
    notebook.interrupt()
    notebook.finish(cell)
    assert cell.error[0] == "KeyboardInterrupt"
    said = len(cell.stdout)
    # The next cell waits for the machine's kernel; what interrupts it reaches the one that runs.
    waiting = notebook.start("%%remote\n1 + 1")
    notebook.wait(lambda: waiting.cards)
    notebook.interrupt()
    notebook.wait(lambda: len(cell.stdout) > said + 10_000_000)
    notebook.interrupt()
    notebook.finish(waiting)
    assert waiting.error[0] == "KeyboardInterrupt"
    notebook.run("%remote restart")
    assert notebook.remote("1 + 1").result == "2"


def test_during_the_start_of_the_machine(open_notebook: Callable[..., Notebook]) -> None:
    notebook = open_notebook()
    for moment in ("at once", "with an agent"):
        cell = notebook.start("%%remote\n1 + 1")
        notebook.wait(lambda cell=cell: cell.cards)
        if moment == "with an agent":
            notebook.wait(lambda: notebook.agents())
        notebook.interrupt()
        notebook.finish(cell)
        assert cell.reply["status"] == "ok" or cell.error[0] == "KeyboardInterrupt"
        assert notebook.remote("2 + 2").result == "4"
        notebook.run("%remote stop")
        until(lambda: not notebook.agents(), "no agent to be left", notebook.agents)


def test_while_variables_are_sent(notebook: Notebook, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    notebook.run(
        "import pathlib, time\n"
        "class Slow:\n"
        "    calm = False\n"
        "    def __reduce__(self):\n"
        "        if not Slow.calm:\n"
        f"            pathlib.Path({str(flag)!r}).touch()\n"
        "            time.sleep(1000)\n"
        "        return Slow, ()\n"
        "slow, other = Slow(), [1]"
    )
    cell = notebook.start("%%remote\nother.append(slow is not None)")
    notebook.wait(flag.exists)
    notebook.interrupt()
    notebook.finish(cell)
    assert cell.error[0] == "KeyboardInterrupt"
    notebook.run("Slow.calm = True")
    assert notebook.remote("other.append(type(slow) is Slow)\nother").result == "[1, True]"
    assert notebook.evaluate("other") == "[1, True]"


def test_while_variables_are_loaded_there(notebook: Notebook, tmp_path: Path) -> None:
    flag, calm = tmp_path / "flag", tmp_path / "calm"
    notebook.run(
        "import pathlib, time\n"
        "def build():\n"
        f"    if not pathlib.Path({str(calm)!r}).exists():\n"
        f"        pathlib.Path({str(flag)!r}).touch()\n"
        "        time.sleep(1000)\n"
        "    return Late()\n"
        "class Late:\n"
        "    def __reduce__(self):\n"
        "        return build, ()\n"
        "late, other = Late(), [1]"
    )
    cell = notebook.start("%%remote\nother.append(late is not None)")
    notebook.wait(flag.exists)
    notebook.interrupt()
    notebook.finish(cell)
    assert cell.error[0] == "KeyboardInterrupt"
    calm.touch()
    assert notebook.remote("other.append(type(late) is Late)\nother").result == "[1, True]"
    assert notebook.evaluate("other") == "[1, True]"


def test_at_any_moment(open_notebook: Callable[..., Notebook]) -> None:
    """An ipykernel that is interrupted just before the cell's code begins, or just after its end,
    drops the request and sends no reply (one in seven of such in a kernel without us). It does go
    idle then, and what matters is that the magic leaves nothing half-done."""
    notebook = open_notebook()
    notebook.run("import time; log = []")
    notebook.remote("log.append(0)")
    interrupted = 0
    for number in range(60):
        cell = notebook.start("%%remote\nlog.append(1)\nfor _ in range(5): time.sleep(0.001)")
        time.sleep(number % 20 / 1000)  # no condition: any moment of a cell's life is meant
        notebook.interrupt()
        notebook.wait(lambda cell=cell: cell.idle)
        notebook.run("done = True")  # all that the kernel had to say about the cell is here now
        if cell.reply:
            assert cell.reply["status"] == "ok" or cell.error[0] == "KeyboardInterrupt"
            interrupted += cell.reply["status"] == "error"
    assert interrupted
    assert notebook.remote("len(log)").result == notebook.evaluate("len(log)")
    notebook.run("log[:] = []")
    assert notebook.remote("log.append(1)\nlog").result == "[1]"
    assert notebook.evaluate("log") == "[1]"
