from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripts import LIMIT, Place, place


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Place]:
    with place(tmp_path) as it:
        yield it


def test_a_script_runs_as_by_python(here: Place) -> None:
    path = here.write(
        "script.py",
        """
        import atexit, os, sys, threading
        from concurrent.futures import ThreadPoolExecutor
        import helper

        class Thing:
            pass

        print(__name__, sys.argv, __file__ == os.path.abspath(sys.argv[0]), Thing)
        print(sys.modules["__main__"].Thing is Thing, helper.answer)
        print("problem", file=sys.stderr)
        os.system("echo from a child")
        atexit.register(print, "at exit")
        started = threading.Event()
        threading.Thread(target=lambda: (started.wait(), print("thread"))).start()
        pool = ThreadPoolExecutor(1)
        pool.submit(started.wait)
        name = input("name? ")
        print("hello", name, sys.stdin.readlines())
        try:
            get_ipython()
        except NameError:
            print("plain")
        pool.submit(started.set)
        started.set()
        sys.exit(7)
        """,
    )
    here.write("helper.py", "answer = 42")
    arguments = ["one", "--two", "--", "key=value"]
    plain = here.run(path.name, *arguments, stdin="Ann\nx\ny\n")
    remote = here.mlinfra("run", path.name, "idle=1m", "--", *arguments, stdin="Ann\nx\ny\n")
    assert plain.returncode == remote.returncode == 7
    assert sorted(remote.stdout.splitlines()) == sorted(plain.stdout.splitlines())
    assert remote.stderr == plain.stderr == "problem\n"
    here.wait_until_no_agent()


def test_the_packages_of_modules_beside_a_script_are_there(here: Place) -> None:
    (here.folder / "below").mkdir()
    path = here.write("below/script.py", "import helper\nprint(helper.answer)")
    here.write("below/helper.py", "import sortedcontainers\nanswer = sortedcontainers.__name__")
    done = here.mlinfra("run", str(path), "isolate=true")
    assert done.stdout == "sortedcontainers\n", done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    return {}['x']\n\nf()",
        "x = (1 +\n",
        "import sys\nsys.exit('no data')",
        "import sys\nsys.exit()",
        "raise SystemExit(3)",
        "import sys\nsys.excepthook = lambda *error: print(error[0])\n1 / 0",
        "import atexit\n@atexit.register\ndef f():\n    print(1)\natexit.unregister(f)",
        "try:\n    1 / 0\nexcept Exception as e:\n    raise ValueError('v') from e",
        "# -*- coding: latin-1 -*-\nprint('é')",
    ],
)
def test_scripts_end_as_by_python(here: Place, code: str) -> None:
    path = here.folder / "script.py"
    path.write_bytes(code.encode("latin-1"))
    plain = here.run(str(path))
    remote = here.mlinfra("run", str(path))
    assert remote.returncode == plain.returncode
    assert (remote.stdout, remote.stderr) == (plain.stdout, plain.stderr)


def test_a_script_runs_in_its_own_store_and_folder(here: Place) -> None:
    path = here.write("script.py", "import os\nprint(os.listdir(), 1 / 0)")
    remote = here.mlinfra("run", str(path), "isolate", "env=none")
    assert remote.returncode == 1
    assert f'File "{path}", line 2, in <module>\n    print(os.listdir(), 1 / 0)' in remote.stderr


def test_ctrl_c_interrupts_a_script(here: Place) -> None:
    path = here.write(
        "script.py",
        """
        import time
        try:
            print("running")
            time.sleep(1000)
        except KeyboardInterrupt:
            print("interrupted")
            raise
        """,
    )
    process = here.start("-m", "mlinfra_sdk.cli", "run", str(path))
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (130, "interrupted\n")
    assert err.startswith("Traceback") and err.endswith("KeyboardInterrupt\n")
    here.wait_until_no_agent()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_command_and_machine(here: Place, number: signal.Signals) -> None:
    path = here.write("script.py", "import time\nprint('running')\ntime.sleep(1000)")
    process = here.start("-m", "mlinfra_sdk.cli", "run", str(path))
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    process.send_signal(number)
    process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + number
    assert not here.agents()


def test_a_reader_that_goes_away(here: Place) -> None:
    path = here.write("script.py", "for i in range(10_000_000):\n    print(i)")
    process = here.start("-m", "mlinfra_sdk.cli", "run", str(path))
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(LIMIT) == 128 + signal.SIGPIPE
    assert not here.agents()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["run", "absent.py"], 2, "The script absent.py cannot be read: No such file"),
        (["run", "script.py", "argument"], 2, "'argument' is not KEY=VALUE."),
        (["run", "script.py", "idel=5m"], 2, "Did you mean 'idle'?"),
        (["run", "script.py", "idle=soon"], 2, "idle=soon in the command line is not understood"),
        (
            ["run", "script.py", "gpu=B200:64", "on=local"],
            2,
            "gpu=B200:64 cannot be met by on=local",
        ),
        (["status", "--", "x"], 2, "status takes no arguments behind --."),
        (["stop", "absent"], 1, "No machine 'absent' runs."),
        (["frobnicate"], 2, "invalid choice"),
        ([], 2, "COMMAND"),
    ],
)
def test_errors_are_one_message(here: Place, words: list[str], status: int, said: str) -> None:
    here.write("script.py", "print(1)")
    done = here.mlinfra(*words)
    assert done.returncode == status
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_status_and_stop(here: Place) -> None:
    start = here.write(
        "start.py",
        """
        import os, sys, mlinfra_sdk
        session = mlinfra_sdk.Session(machine=sys.argv[1], price=3600)
        session.run("x = 1")
        """,
    )
    here.env["MLINFRA_IDLE"] = "20m"
    for name in ("one", "two", "three"):
        assert here.run(str(start), name).returncode == 0
    status = json.loads(here.mlinfra("status", "--json").stdout)
    assert sorted(machine["name"] for machine in status["machines"]) == ["one", "three", "two"]
    assert {machine["usd_per_hour"] for machine in status["machines"]} == {3600.0}
    assert all(machine["usd"] > 0 for machine in status["machines"])
    assert status["settings"]["idle"] == {
        "value": "20m",
        "origin": "the environment variable MLINFRA_IDLE",
    }
    shown = here.mlinfra("status").stdout
    assert all(word in shown for word in ("three", "$3600.00/h", "MLINFRA_IDLE"))

    refused = here.mlinfra("stop")
    assert refused.returncode == 1 and "More than one machine runs" in refused.stderr
    assert here.mlinfra("stop", "two").stdout == "two is stopped.\n"
    assert len(here.agents()) == 2
    assert here.mlinfra("stop", "--all").returncode == 0
    assert not here.agents()
    assert here.mlinfra("stop").stdout == "No machine runs.\n"


def test_doctor_finds_nothing_wrong(here: Place) -> None:
    here.env |= {"HOME": str(here.folder)}  # nobody is logged in anywhere
    done = here.mlinfra("doctor", "--json")
    report = json.loads(done.stdout)
    assert report["ok"] and done.returncode == 0, report
    assert {"Python", "ledger", "GPU", "on=local", "round trip"} <= {
        check["name"] for check in report["checks"]
    }
    modal = next(check for check in report["checks"] if check["name"] == "on=modal")
    assert modal["optional"] and "modal token new" in modal["mend"]
    here.wait_until_no_agent()
    assert here.mlinfra("doctor").stdout.endswith("Everything works.\n")


def test_doctor_minds_what_the_settings_speak_of(here: Place) -> None:
    here.env |= {"HOME": str(here.folder)}
    (here.folder / "pyproject.toml").write_text("[tool.mlinfra.targets.modal]\ncpu = 2\n")
    done = here.mlinfra("doctor")
    assert done.returncode == 1
    assert "PROBLEM on=modal: There is no token for Modal." in done.stdout


def test_doctor_says_how_to_mend(here: Place) -> None:
    here.home.mkdir(mode=0o755)
    os.chmod(here.home, 0o755)
    (here.home / "ledger.sqlite").write_bytes(b"not a database, but long enough to be looked at")
    here.env["MLINFRA_IDLE"] = "soon"
    done = here.mlinfra("doctor", "--json")
    assert done.returncode == 1
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert found["state directory"]["mend"] == f"Run: chmod 700 '{here.home}'"
    assert "MLINFRA_IDLE" in found["settings"]["detail"]
    assert not found["ledger"]["ok"] and found["ledger"]["mend"]
    assert found["Python"]["ok"] and found["on=local"]["ok"]


def test_the_catalog_as_a_table_and_as_json(here: Place) -> None:
    done = here.mlinfra("catalog", "--gpu", "A10:2|T4")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["T4", "16", "GB", "320", "8.1", "-", "-", "65"] in rows
    offers = [row for row in rows if "modal" in row]
    assert [row[:4] for row in offers] == [
        ["A10:2", "modal", "A10", "2.20"],
        ["T4", "modal", "T4", "0.59"],
    ]
    assert all(row[5:] == ["2026-07-01", "stale", "list", "price"] for row in offers)
    assert not any("H100" in line for line in done.stdout.splitlines())

    done = here.mlinfra("catalog", "--gpu", "T4", "--provider", "modal", "--json")
    found = json.loads(done.stdout)
    assert [part["name"] for part in found["accelerators"]] == ["T4"]
    (rate,) = found["rates"]
    assert rate["usd_per_hour"] == 0.5904 and rate["stale"]
    assert rate["source"] == "https://modal.com/pricing"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "H10O"], "The GPU 'H10O' is not understood. Did you mean 'H100'?"),
        (["--provider", "modl"], "No prices of 'modl' are known. Did you mean 'modal'?"),
    ],
)
def test_what_the_catalog_lacks_is_named(here: Place, words: list[str], said: str) -> None:
    done = here.mlinfra("catalog", *words)
    assert done.returncode == 2 and said in done.stderr
