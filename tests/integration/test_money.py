"""Money before and while it is spent: quotes, questions, budgets."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clouds import A10G, clouds
from live import end_of, opened, until
from scripts import Place, place

from mlinfra_sdk.errors import BudgetSpent, NotConfirmed, RequestError
from mlinfra_sdk.frontend import Console
from mlinfra_sdk.ledger import Ledger, Price
from mlinfra_sdk.machines import budgets
from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.session import Session

DEAR = {"gpus": {"A10": 8.0}, "has": A10G}
FOR_EVER = "import time\nwhile True: time.sleep(0.05)"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A state directory for sessions of this process and for commands."""
    with place(tmp_path) as it:
        monkeypatch.setenv("MLINFRA_HOME", str(it.home))
        monkeypatch.chdir(tmp_path)
        yield it


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Budgets that last for seconds."""
    monkeypatch.setattr(budgets, "_SHORTEST", 1.0)
    monkeypatch.setattr(budgets, "_TEARDOWN", 0.0)


# -- before ----------------------------------------------------------------------------------


def test_quotes_compare_all_who_have_it(here: Place) -> None:
    plans = {
        "cheap": {"gpus": {"A10": 1.2}},
        "dear": {"gpus": {"A10": 8}},
        "odd": {"gpus": {"A10": None}},
    }
    with clouds(here.folder / "clouds", **plans):
        here.env.update(os.environ | {"MLINFRA_HOME": str(here.home)})
        shown = here.mlinfra("quote", "gpu=A10").stdout
        rows = [line.split() for line in shown.splitlines()]
        assert rows[1] == [
            *("A10", "cheap", "1.20", "$0.20", "about", "30s", "cheap.example", "2026-11-25")
        ]
        assert rows[2][:4] == ["A10", "dear", "8.00", "$1.33"]
        assert rows[3] == ["A10", "odd", "unknown", "unknown", "about", "30s", "-", "-"]
        assert "local has none." in shown and "Not set up: " in shown and "modal" in shown
        found = json.loads(here.mlinfra("quote", "gpu=A10", "--json").stdout)
    assert [it["usd_per_hour"] for it in found["quotes"]] == [1.2, 8.0, None]
    assert found["quotes"][0]["price_source"] == "https://cheap.example/x"
    assert here.agents() == []


def test_a_long_cell_here_is_told_of_gpus_once(tmp_path: Path) -> None:
    work = "import time\nend = time.perf_counter() + {}\nwhile time.perf_counter() < end: pass"
    with opened(tmp_path / "notebook") as notebook:
        notebook.run("%remote use hint=1s")
        assert not notebook.run(work.format(1.2)).outputs  # nothing here can use a GPU
        notebook.run("import torch")
        assert not notebook.run(work.format(0.5)).outputs
        (shown,) = notebook.run(work.format(1.3)).of("display_data")
        text = shown["content"]["data"]["text/plain"]
        assert re.match(r"This cell took \d.\ds here\. An estimate of what it takes on a GPU", text)
        assert re.search(r"^  \S+: \S+ \(\S+ to \S+\), <?\$0\.\d+ at \$", text, re.M), text
        assert "%remote use hint=no" in text
        assert not notebook.run(work.format(1.3)).outputs  # it has been said
        notebook.run("%remote use hint=no")
        assert not notebook.run(work.format(1.4)).outputs
        assert notebook.fail("%%remote hint=1s\n1").error[0] == "RequestError"


def test_a_notebook_is_asked_above_the_limit(tmp_path: Path) -> None:
    plans = {"cheap": DEAR, "odd": {**DEAR, "gpus": {"A10": 0.5}}}
    with clouds(tmp_path / "clouds", **plans), opened(tmp_path / "notebook") as notebook:
        shown = notebook.run("%remote quote gpu=A10 on=cheap").of("display_data")
        assert "cheap.example" in str(shown)
        refused = notebook.fail("%%remote gpu=A10 on=cheap\n1", answers=["n"])
        assert refused.error[0] == "NotConfirmed" and "you said no" in refused.error[1]
        (card,) = [it for it in map(facts, refused.cards) if it["phase"] == "confirm"]
        assert card["note"] == (
            "A10 on cheap at $8.00/h (cheap.example, 2026-11-25): $1.33 in 10 minutes; "
            "it starts in about 30s. That is more than $5.00/h (confirm=)."
        )
        silent = notebook.fail("%%remote gpu=A10 on=cheap\n1", allow_stdin=False)
        assert "nobody can be asked here" in silent.error[1] and "--yes" in silent.error[1]
        assert notebook.agents() == []

        # Seconds of work, and so money, that this cell has taken before are told with the quote.
        cell = "%%remote gpu=A10 on=cheap\n1"
        assert notebook.run(cell, answers=["y"]).result == "1"
        assert "Estimate" not in told(notebook.run(cell))
        notebook.run("%remote stop")
        notebook.run("%remote use confirm=no")
        again = notebook.run(cell)
        assert not again.prompts and again.result == "1"
        assert "Estimate from 2 runs of this cell on A10: " in told(again)
        notebook.run("import time; time.sleep(1.1)")
        (shown,) = notebook.run("%remote quote gpu=A10 on=cheap").of("display_data")
        text = shown["content"]["data"]["text/plain"]
        assert "`time.sleep(1.1)`" not in text and "from 1 run on local and figures" in text
        notebook.run(cell)
        (shown,) = notebook.run("%remote quote gpu=A10 on=cheap").of("display_data")
        text = shown["content"]["data"]["text/plain"]
        assert "the cell, estimated" in text and "from 4 runs of this cell on A10" in text
        assert "$1.33 in 10 minutes; it starts in about 30s." in told(again)
        notebook.run("%remote stop")

        # What nothing ends for sure is asked about once for each target.
        notebook.run("%remote use confirm=")
        cell = "%%remote gpu=A10 on=odd\n2"
        assert "only the worker ends" in question(notebook.run(cell, answers=["yes"]))
        notebook.run("%remote stop")
        assert not notebook.run(cell).prompts
        assert (notebook.home / "confirmed.json").stat().st_mode & 0o777 == 0o600
    ledger = Ledger.open(notebook.home / "ledger.sqlite")
    cells = {run.cell for run in ledger.runs()}
    ledger.close()
    assert len(cells) == 2 and all(len(cell) == 16 for cell in cells)  # digests, no source


def facts(message: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = message["content"]["data"]["application/vnd.mlinfra.run+json"]
    return found


def told(cell: Any) -> str:
    return " ".join(facts(message)["note"] for message in cell.cards)


def question(cell: Any) -> str:
    return next(it["note"] for it in map(facts, cell.cards) if it["phase"] == "confirm")


def test_scripts_say_yes_by_a_flag(here: Place) -> None:
    here.write("script.py", "print('ran')")
    with clouds(here.folder / "clouds", cheap=DEAR):
        here.env.update(os.environ | {"MLINFRA_HOME": str(here.home)})
        refused = here.mlinfra("run", "script.py", "gpu=A10", "on=cheap", stdin="y\n")
        assert refused.returncode == 1
        assert "A10 on cheap at $8.00/h" in refused.stderr and "--yes" in refused.stderr
        done = here.mlinfra("run", "script.py", "gpu=A10", "on=cheap", "--yes")
        assert (done.stdout, done.returncode) == ("ran\n", 0), done.stderr
        with pytest.raises(NotConfirmed):
            Session(namespace={}, gpu="A10", on="cheap", confirm="yes").run("1")


class Asked(Console):
    """Somebody who says yes, and counts the questions."""

    def __init__(self) -> None:
        super().__init__()
        self.questions = 0

    def confirm(self, question: str) -> bool | None:
        self.questions += 1
        return True


def test_a_yes_holds_for_the_machines_on_which_a_run_goes_on(here: Place) -> None:
    """Nobody may be there to be asked again."""
    code = (
        "import os, time\n"
        "with open({name!r}, 'a') as file: file.write('x')\n"
        "while os.path.getsize({name!r}) < 2: time.sleep(0.05)\n"
    )

    def lose(name: Path) -> None:
        until(name.exists, "its beginning")
        for agent in here.agents():
            agent.kill()

    first, second = here.folder / "first", here.folder / "second"
    asked = Asked()
    with clouds(here.folder / "clouds", cheap=DEAR):
        settings: dict[str, Any] = {"gpu": "A10", "on": "cheap", "recover": "always", "env": "none"}
        with Session(namespace={}, **settings) as session:
            killer = threading.Thread(target=lose, args=[first])
            killer.start()
            session.run(code.format(name=str(first)), frontend=asked)
            killer.join()
            assert asked.questions == 1
            behind = code.format(name=str(second)) + "'came through'"
            names = cell_names(behind, session.namespace, behind)
            handle = session.start(behind, names, count=1, frontend=asked)
            lose(second)
            assert handle.result(120) == "came through"
            assert asked.questions == 1
            session.stop()
            session.run("1", frontend=asked)
            assert asked.questions == 2
    assert first.read_text() == second.read_text() == "xx"


# -- while -----------------------------------------------------------------------------------


def test_a_run_ends_with_its_budget(here: Place, capfd: pytest.CaptureFixture[str]) -> None:
    with Session(namespace={}, price=3600, budget=2) as session:  # a dollar a second
        began = time.monotonic()
        with pytest.raises(BudgetSpent, match=r"budget=\$2.00"):
            session.run(FOR_EVER)
        assert time.monotonic() - began >= 2
        assert "of this run's budget are left (budget=$2.00)" in capfd.readouterr().err
        assert session.run("6 * 7") == 42  # the machine goes on
        (run, *_) = session.ledger.runs()
        assert run.status == "interrupted" and run.seconds is not None and run.seconds < 20


def test_a_machine_ends_with_its_budget_and_nobody_there(here: Place, at_once: None) -> None:
    session = Session(namespace={}, price=3600, machine="paid", machine_budget=12)
    session.start(FOR_EVER, cell_names(FOR_EVER, {}, FOR_EVER), count=0)
    session.close()  # this computer is off; the run goes on
    until(lambda: not here.agents(), "its end")
    assert end_of("paid") == "its budget was spent: machine_budget=$12.00"
    ledger = Ledger.open()
    (machine,) = ledger.machines()
    assert ledger.cost(machine.id).total == pytest.approx(12e6, rel=0.2)
    ledger.close()


def test_who_waits_hears_of_it(here: Place, at_once: None) -> None:
    session = Session(namespace={}, price=3600, month_budget=15)
    with pytest.raises(BudgetSpent, match=r"has ended: its budget was spent: month_budget=\$15"):
        session.run(FOR_EVER)
    here.wait_until_no_agent()
    with pytest.raises(BudgetSpent, match=r"month_budget=\$15.00 leaves nothing"):
        session.run("1")
    session.close()
    (machine, *others) = (ledger := Ledger.open()).machines()
    assert machine.stop_reason == "its budget was spent: month_budget=$15.00"
    assert all("leaves nothing" in it.stop_reason for it in others)
    assert ledger.cost().total == pytest.approx(15e6, rel=0.2)
    ledger.close()


def test_two_kernels_cannot_spend_the_same_money(here: Place) -> None:
    ledger = Ledger.open()
    month = time.strftime("month:%Y-%m")
    limit, errors, given = 10_000_000, [], []
    price = Price(20_000_000, "https://x.example", "2026-11-25")  # half a budget each hour
    request = Session(namespace={}, month_budget=10).request

    def take(number: int) -> None:
        own = Ledger.open()
        id = own.intend_machine(name=f"m{number}", provider="cheap", price=price)
        (machine,) = [it for it in own.machines() if it.id == id]
        try:
            share = budgets.share(own, machine, request, "nb.ipynb")
            assert share is not None
            given.append(share.seconds)
        except BudgetSpent as error:
            errors.append(error)
        own.close()

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent, held = ledger.scope_use(month)
    assert 0 < spent + held <= limit
    assert sum(given) * price.micro_per_hour / 3600 <= limit
    assert len(given) + len(errors) == 6 and errors
    assert all("are held for machines that run" in error.message for error in errors)
    # What an ended machine has left is free again.
    for machine in ledger.machines(active=True):
        ledger.machine_stopped(machine.id, reason="the test")
    id = ledger.intend_machine(name="next", provider="cheap", price=price)
    (machine,) = ledger.machines(active=True)
    assert machine.id == id and budgets.share(ledger, machine, request, "") is not None
    ledger.close()


def test_a_warning_comes_once(here: Place, at_once: None) -> None:
    class Notes(Console):
        def __init__(self) -> None:
            super().__init__()
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    notes = Notes()
    ledger = Ledger.open()
    old = ledger.intend_machine(
        name="old", provider="cheap", price=Price(3_600_000_000, "x", "2026-11-25")
    )
    ledger.machine_started(old, at=time.time() - 85)
    ledger.machine_stopped(old, reason="the test", at=time.time())
    with Session(namespace={}, price=0.01, month_budget=100) as session:
        session.run("1", frontend=notes)
        session.run("2", frontend=notes)
        (warning,) = [text for text in notes.notes if "are spent" in text]
        assert warning == "85 % of month_budget=$100.00 are spent: $85.00."
        agent = session.agent()
        assert agent is not None
        assert [it.cause for it in agent.ends] == ["idle", "lease", "budget"]
    ledger.close()


def test_a_budget_needs_a_price(here: Place) -> None:
    with clouds(here.folder / "clouds", cheap={"gpus": {"A10": None}, "has": A10G}):
        session = Session(namespace={}, gpu="A10", on="cheap", budget=5, confirm="no")
        with pytest.raises(RequestError, match="budget= cannot be kept on cheap: nobody states"):
            session.run("1")
    assert here.agents() == []
