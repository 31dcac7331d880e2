"""Runs that go on by themselves, as a notebook's magics start them and bring them back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from live import Notebook, until

Open = Callable[..., Notebook]

NOTHING = "No run goes on, and none waits to be collected.\n"


def waiting(name: str, then: str) -> str:
    """Code that waits until the test has made a file of this name in the working directory."""
    return (
        "import pathlib, time\n"
        f"print('{name} waits', flush=True)\n"
        f"while not pathlib.Path('{name}').exists(): time.sleep(0.02)\n"
        f"{then}"
    )


def begun(notebook: Notebook, name: str) -> None:
    until(lambda: f"{name}  on" in (runs := listed(notebook)) and " running for" in runs, name)


def listed(notebook: Notebook) -> str:
    return notebook.run("%remote runs").stdout


@pytest.fixture(autouse=True)
def nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test that failed has left must not fail the next ones, nor its own next try."""
    yield
    if "notebook" in request.fixturenames:
        notebook: Notebook = request.getfixturevalue("notebook")

        def nothing() -> bool:  # a run that is interrupted waits to be discarded
            names = re.findall(r"^(\S+)  on ", listed(notebook), re.M)
            for name in names:
                notebook.start(f"%remote cancel {name}")
            return not names

        until(nothing, "runs to be gone")


def test_a_detached_run_from_its_start_to_its_collection(notebook: Notebook) -> None:
    notebook.run("factor = 6")
    cell = notebook.run(
        "%%remote detach name=train\n" + waiting("train", "answer = 7 * factor; print(answer)")
    )
    assert cell.result == "<run train>"
    assert "Detached as train" in cell.cards[-1]["content"]["data"]["text/plain"]
    begun(notebook, "train")
    assert notebook.run("factor * 2").result == "12"  # the kernel stays usable
    until(lambda: notebook.run("%remote logs train").stdout == "train waits\n", "its output")
    wait, follow = notebook.start("%remote wait train"), notebook.start("%remote logs train -f")
    (notebook.work / "train").touch()
    assert notebook.finish(wait).stdout == "train has ended: done.\n"
    assert notebook.finish(follow).stdout == "train waits\n42\n"
    assert "train  on local-" in listed(notebook) and " done " in listed(notebook)
    assert notebook.fail("answer").error[0] == "NameError"
    attached = notebook.run("%remote attach train")
    assert attached.stdout == "train waits\n42\n"
    assert attached.cards[-1]["content"]["data"]["text/plain"].startswith("Done · ")
    assert notebook.run("answer").result == "42"
    assert listed(notebook) == NOTHING
    assert "no run 'train'" in notebook.fail("%remote attach train").error[1]


def test_runs_wait_for_each_other_or_have_kernels_of_their_own(notebook: Notebook) -> None:
    notebook.run("%%remote detach name=one\n" + waiting("one", "first = 1"))
    notebook.run("%%remote detach name=two\nsecond = first + 1")
    notebook.run("%%remote detach name=beside kernel=new\nthird = 3; print('beside')")
    assert notebook.run("%remote wait beside").stdout == "beside has ended: done.\n"
    states = {line.split()[0]: line for line in listed(notebook).splitlines()}
    assert " running for " in states["one"] and " queued for " in states["two"]
    (notebook.work / "one").touch()
    # They are collected in any order, and each brings its own variables.
    assert notebook.run("%remote attach beside").stdout == "beside\n"
    for name in ("two", "one"):
        notebook.run(f"%remote attach {name}")
    assert notebook.run("first, second, third").result == "(1, 2, 3)"
    assert listed(notebook) == NOTHING


def test_what_runs_or_waits_is_cancelled(notebook: Notebook) -> None:
    notebook.run("%%remote detach name=endless\n" + waiting("never", ""))
    notebook.run("%%remote detach name=after\nprint('never seen')")
    begun(notebook, "endless")
    for name in ("after", "endless"):
        assert notebook.run(f"%remote cancel {name}").stdout == f"{name} is cancelled.\n"
    notebook.run("%remote wait endless")
    assert notebook.fail("%remote attach endless").error[0] == "KeyboardInterrupt"
    assert "cancelled before it began" in notebook.fail("%remote attach after").error[1]
    assert notebook.run("%%remote\n'goes on'").result == "'goes on'"
    assert listed(notebook) == NOTHING


def test_a_background_run_shows_itself_under_its_own_cell(notebook: Notebook) -> None:
    cell = notebook.run("%%remote async name=side\n" + waiting("side", "late = 5\nlate + 1"))
    notebook.wait(lambda: cell.stdout == "side waits\n")
    busy = notebook.start("import pathlib, time\nwhile not pathlib.Path('free').exists(): pass")
    (notebook.work / "side").touch()

    # Its end is told at once; its variables come as soon as no cell runs.
    def ended() -> bool:
        return cell.cards[-1]["content"]["data"]["text/plain"].startswith("Done · ")

    notebook.wait(ended)
    assert not busy.done
    (notebook.work / "free").touch()
    notebook.finish(busy)
    assert notebook.run("late").result == "5"


def test_a_background_run_shows_itself_after_many_other_cells(notebook: Notebook) -> None:
    cell = notebook.run("%%remote async name=long kernel=new\n" + waiting("long", "print('late')"))
    notebook.wait(lambda: cell.stdout == "long waits\n")
    for number in range(70):
        assert notebook.remote(str(number)).result == str(number)
    (notebook.work / "long").touch()
    notebook.wait(lambda: cell.stdout == "long waits\nlate\n")


LOOP = """
import pathlib, time, mlinfra_sdk
state = dict(total=0)
for step in mlinfra_sdk.checkpoint("steps").loop(range(30), state=state, every=10):
    while step == 25 and not pathlib.Path("steps").exists():
        time.sleep(0.02)
    state["total"] += step
    print(step)
total = state["total"]
"""


def test_a_background_run_goes_on_when_its_machine_is_lost(notebook: Notebook) -> None:
    cell = notebook.run(f"%%remote async name=steps\n{LOOP}")
    notebook.wait(lambda: cell.stdout.endswith("24\n"))
    notebook.wait(lambda: "step 20" in cell.cards[-1]["content"]["data"]["text/plain"])
    agents = notebook.agents()
    for process in [*notebook.workers(), *agents]:
        process.kill()
    notebook.wait(lambda: "goes on from checkpoint steps #" in cell.stderr)
    (notebook.work / "steps").touch()
    notebook.wait(lambda: cell.cards[-1]["content"]["data"]["text/plain"].startswith("Done · "))
    assert cell.stdout.split() == [str(step) for step in [*range(25), *range(20, 30)]]
    assert notebook.run("total").result == str(sum(range(30)))
    assert listed(notebook) == NOTHING
    assert agents and not {it.pid for it in agents} & {it.pid for it in notebook.agents()}


def test_a_handle_is_a_future(notebook: Notebook) -> None:
    notebook.run("%%remote async\nsum(range(10))")
    notebook.run("handle = _")
    assert notebook.run("handle.result(60), handle.done()").result == "(45, True)"
    notebook.run("%%remote async\n1 / 0")
    notebook.run("failing = _")
    assert notebook.fail("await failing").error[0] == "ZeroDivisionError"
    notebook.run("%%remote async\n" + waiting("never", ""))
    notebook.run("endless = _")
    assert notebook.run("endless.wait(0.1)").result == "False"
    assert "has not ended" in notebook.fail("endless.result(0.1)").error[1]
    notebook.run("endless.cancel()")
    assert notebook.fail("endless.result(60)").error[0] == "KeyboardInterrupt"


def test_a_killed_kernel_finds_its_run_again(open_notebook: Open) -> None:
    """The next one attaches without a name, for there is one run only."""
    notebook = open_notebook("killed")
    notebook.start("%%remote\n" + waiting("killed", "found = [1, 2]; print('ended')"))
    until(lambda: list(notebook.home.glob("machines/*/runs/*/*.records")), "its first output")
    notebook.kill()
    notebook.restart()
    attached = notebook.start("%remote attach")
    notebook.wait(lambda: attached.stdout == "killed waits\n")
    (notebook.work / "killed").touch()
    notebook.finish(attached)
    assert attached.stdout == "killed waits\nended\n"
    assert notebook.run("found").result == "[1, 2]"
    assert listed(notebook) == NOTHING
    # What comes next runs where its variables are.
    assert notebook.run("%%remote\nfound.append(3); found").result == "[1, 2, 3]"
    notebook.run("%remote stop")
