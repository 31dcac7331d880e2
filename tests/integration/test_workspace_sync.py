"""The notebook's folder on a machine with files of its own: real kernels, agents and faults."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live import Notebook, until
from scripts import Place, place

Open = Callable[..., Notebook]


@pytest.fixture
def notebook(open_notebook: Open) -> Notebook:
    it = open_notebook()
    it.run("%remote use isolate=yes")
    return it


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Place]:
    with place(tmp_path) as it:
        (it.folder / ".mlignore").write_text("/script.py\n/home/\n")
        yield it


def test_a_notebook_with_data_and_modules(notebook: Notebook) -> None:
    work = notebook.work
    (work / "data").mkdir()
    (work / "data" / "train.csv").write_text("a,b\n1,2\n3,4\n")
    (work / "utils.py").write_text(
        "from settings import FACTOR\ndef f(x):\n    return FACTOR * x\n"
    )
    (work / "settings.py").write_text("FACTOR = 2\n")
    notebook.run("from utils import f\nimport utils")
    cell = notebook.remote(
        "import os, pathlib\n"
        "there = os.getcwd()\n"
        "lines = open('data/train.csv').read().splitlines()\n"
        "print(len(lines), f(3), utils.f(4))\n"
        "pathlib.Path('out').mkdir()\n"
        "_ = pathlib.Path('out/result.txt').write_text('42')"
    )
    assert cell.stdout == "3 6 8\n"
    assert notebook.evaluate("there != __import__('os').getcwd()") == "True"
    assert (work / "out" / "result.txt").read_text() == "42"
    assert "out/result.txt" in str(cell.cards[-1]["content"]["data"])

    # Edited within the same second and to the same length: the cell sees the new code.
    (work / "utils.py").write_text(
        "from settings import FACTOR\ndef f(x):\n    return FACTOR + x\n"
    )
    assert notebook.remote("print(f(3), utils.f(4))").stdout == "5 6\n"
    (work / "settings.py").write_text("FACTOR = 3\n")
    assert notebook.remote("print(f(3), utils.f(4))").stdout == "6 7\n"
    (work / "settings.py").write_text("FACTOR = = 3\n")
    cell = notebook.fail("%%remote\nimport settings")
    assert cell.error[0] == "SyntaxError"
    assert "settings could not be loaded" in str(cell.cards[-1]["content"]["data"])
    (work / "settings.py").write_text("FACTOR = 4\n")
    assert notebook.remote("import settings\nprint(settings.FACTOR)").stdout == "4\n"


def test_the_working_directory_follows(notebook: Notebook) -> None:
    (notebook.work / "sub" / "deep").mkdir(parents=True)
    (notebook.work / "sub" / "here.txt").write_text("x")
    (notebook.work / "lib").mkdir()
    (notebook.work / "lib" / "in_lib.py").write_text("value = 7\n")
    notebook.run("%cd -q sub\nimport sys; sys.path.insert(0, '../lib')")
    cell = notebook.remote("import in_lib, os\nprint(open('here.txt').read(), in_lib.value)")
    assert cell.stdout == "x 7\n"
    notebook.remote("%cd -q deep\nopen('new.txt', 'w').close()")
    assert notebook.evaluate("__import__('os').getcwd()") == repr(
        str(notebook.work / "sub" / "deep")
    )
    assert (notebook.work / "sub" / "deep" / "new.txt").exists()


def test_the_sync_command(notebook: Notebook) -> None:
    work = notebook.work
    assert "no machine" in notebook.run("%remote sync").stdout
    (work / "a.txt").write_text("1")
    notebook.run(
        "%%remote eager_limit=1kB\nimport pathlib\n"
        "for name, size in (('big.bin', 5000), ('small.txt', 10)):\n"
        "    _ = pathlib.Path(name).write_bytes(b'x' * size)"
    )
    assert (work / "small.txt").exists() and not (work / "big.bin").exists()
    missed = notebook.fail("open('big.bin')")
    assert "big.bin (5 kB) lies on" in missed.stderr
    assert "`%remote sync big.bin` brings it here." in missed.stderr
    assert notebook.fail("open('nowhere.bin')").stderr == ""
    notebook.run("%remote use isolate=yes eager_limit=1kB")
    (work / "a.txt").write_text("12")
    assert notebook.run("%remote sync --dry-run").stdout.splitlines() == [
        "send          a.txt  2 B",
        "stays there   big.bin  5 kB",
        "2 B at most would move.",
    ]
    assert notebook.run("%remote sync").stdout == "1 file sent.\n"
    assert notebook.run("%remote sync big.bin").stdout == "1 file fetched.\n"
    assert (work / "big.bin").stat().st_size == 5000
    assert notebook.run("%remote sync").stdout == "Both sides are alike.\n"
    assert "Name files of this workspace" in notebook.fail("%remote sync /etc").error[1]
    assert "does not know '--drop'" in notebook.fail("%remote sync --drop").error[1]


def test_conflicts_and_deletions(notebook: Notebook) -> None:
    work = notebook.work
    for name in ("kept", "gone", "both"):
        (work / f"{name}.txt").write_text("old")
    cell = notebook.start(
        "%%remote\nimport os, pathlib\n"
        "os.remove('gone.txt')\n"
        "print('working', flush=True)\n"
        "_ = input()\n"
        "_ = pathlib.Path('both.txt').write_text('theirs')"
    )
    notebook.wait(lambda: cell.prompts)
    (work / "both.txt").write_text("mine")
    notebook._client.input("")
    notebook.finish(cell)
    assert cell.reply["status"] == "ok"
    assert sorted(path.name for path in work.iterdir())[1:] == ["both.txt", "kept.txt"]
    assert (work / "both.txt").read_text() == "mine"
    (copy,) = work.glob("both (conflict from local-* *).txt")
    assert copy.read_text() == "theirs"
    assert "both.txt was changed on both sides" in str(cell.cards[-1]["content"]["data"])


def test_too_much_is_a_question(notebook: Notebook) -> None:
    (notebook.work / "data").mkdir()
    (notebook.work / "data" / "x.bin").write_bytes(os.urandom(3000))
    name, text = notebook.fail("%%remote sync_limit=2kB\n1").error
    assert name == "RequestError"
    assert "3 kB of files would be sent" in text and "/data/" in text and ".mlignore" in text
    cell = notebook.run("%%remote sync_limit=2kB sync=no\nimport os\nprint(os.listdir())")
    assert cell.stdout == "[]\n"
    assert notebook.run("%%remote\nprint(os.listdir())").stdout == "['data']\n"


def test_detached_runs_bring_their_files_when_they_are_collected(notebook: Notebook) -> None:
    (notebook.work / "in.txt").write_text("5")
    notebook.run(
        "%%remote name=train detach\nimport pathlib\n"
        "_ = pathlib.Path('out.txt').write_text(open('in.txt').read() * 2)"
    )
    notebook.run("%remote attach train")
    assert (notebook.work / "out.txt").read_text() == "55"


def write_data(here: Place) -> None:
    """Enough for eight batches, of which three are under way at once."""
    data = here.folder / "data"
    data.mkdir()
    for number in range(240):
        (data / f"{number}.bin").write_bytes(os.urandom(500_000))


def test_an_interrupt_and_a_kill_in_the_middle_of_a_sync(here: Place) -> None:
    write_data(here)
    code = """
        import os, signal, sys, threading, mlinfra_sdk
        from mlinfra_sdk.sync.staging import Stager
        staged, stage = 0, Stager.stage
        def counting(self, wants):
            global staged
            staged += 1
            if staged == {at}:
                os.kill(os.getpid(), {signal})
            return stage(self, wants)
        Stager.stage = counting
        session = mlinfra_sdk.Session(isolate=True, machine="m", idle="1m")
        try:
            session.run("1")
        except KeyboardInterrupt:
            print("interrupted")
        Stager.stage = stage
        {then}
    """
    killed = here.write("script.py", code.format(at=6, signal="signal.SIGKILL", then=""))
    assert here.run(str(killed)).returncode == -9
    there = list(here.home.glob("machines/*/workspaces/*"))
    assert there and 0 < len(list(there[0].glob("data/*"))) < 240
    then = """session.run("import os; names = os.listdir('data')")
        print(len(session.namespace["names"]))
        session.stop()"""
    interrupted = code.format(at=2, signal="signal.SIGINT", then=then)
    assert here.script(interrupted) == "interrupted\n240\n"
    assert not list(here.folder.rglob(".mlinfra-tmp-*"))


def test_an_agent_that_is_killed_in_the_middle_of_a_sync(here: Place) -> None:
    write_data(here)
    script = here.write(
        "script.py",
        """
        import os, signal, psutil, mlinfra_sdk
        from mlinfra_sdk.sync.staging import Stager
        session = mlinfra_sdk.Session(isolate=True, idle="1m")
        session._connect()
        staged, stage = 0, Stager.stage
        def counting(self, wants):
            global staged
            staged += 1
            if staged == 3:
                for process in psutil.process_iter(["cmdline"]):
                    words = process.info["cmdline"] or []
                    if "mlinfra_sdk.worker" in words and os.environ["MLINFRA_HOME"] in words[-1]:
                        process.kill()
            return stage(self, wants)
        Stager.stage = counting
        try:
            session.run("1")
        except mlinfra_sdk.MlinfraError as error:
            print(type(error).__name__)
        session.run("import os; names = os.listdir('data')")
        print(len(session.namespace["names"]))
        session.stop()
        """,
    )
    done = here.run(str(script))
    assert done.stdout == "LinkClosed\n240\n", done.stderr


def test_the_state_of_a_machine_goes_with_it(notebook: Notebook) -> None:
    (notebook.work / "a.txt").write_text("1")
    notebook.remote("1")
    state = notebook.home / "sync"
    assert list(state.glob("*.base"))
    notebook.run("%remote stop")
    until(lambda: not list(state.glob("*.base")), "the record of the machine to be removed")
