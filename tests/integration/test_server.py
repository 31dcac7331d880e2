"""The server extension in a real Jupyter Server below a base_url, with real machines."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from jupyter_servers import JupyterServer, jupyter_server
from live import until
from scripts import Place

from mlinfra_sdk.ledger import Ledger, Price
from mlinfra_sdk.worker.folder import load_config

MONDAY = 1_795_000_000.0


class Served(Place):
    """A place of the user's own whose server runs."""

    def __init__(self, server: JupyterServer) -> None:
        super().__init__(server.home)
        self.server = server
        self.home = server.home / ".local" / "share" / "mlinfra"
        self.env.pop("MLINFRA_HOME")
        self.env["HOME"] = str(server.home)
        self.url = f"{server.url}mlinfra/"
        self.client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"token {server.token}"},
            timeout=30,
            trust_env=False,
        )

    def ledger(self) -> Ledger:
        return Ledger.open(self.home / "ledger.sqlite")

    def get(self, path: str, /, **query: str | int) -> Any:
        reply = self.client.get(path, params=query)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def post(self, path: str, body: object = None) -> Any:
        reply = self.client.post(path, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def machine(self, name: str) -> Any:
        """A machine that runs, and is observed."""
        return next((it for it in self.get("state")["machines"] if it["name"] == name), None)

    @contextmanager
    def events(self) -> Iterator[Iterator[Any]]:
        """The states of the stream, as a page gets them."""
        with self.client.stream("GET", "events") as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            lines = reply.iter_lines()
            yield (json.loads(line[6:]) for line in lines if line.startswith("data: "))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with jupyter_server(tmp_path_factory.mktemp("server")) as server:
        place = Served(server)
        try:
            yield place
        finally:
            for agent in place.agents():
                agent.terminate()
            place.wait_until_no_agent()


OTHER_PROCESS = """
import sys
from mlinfra_sdk.ledger import Ledger, Price
from mlinfra_sdk.worker.folder import load_config
ledger = Ledger.open()
machine = ledger.intend_machine(
    name=sys.argv[1], provider="local", price=Price(1_000_000, "https://x.org/p", "2026-11-20")
)
ledger.machine_started(machine)
"""


def test_strangers_and_other_sites_are_refused(here: Served) -> None:
    paths = ("state", "events", "openapi.json", "runs/1/log")
    with httpx.Client(base_url=here.url, trust_env=False) as stranger:
        for path in paths:
            assert stranger.get(path).status_code == 403
        stop = f"machines/{'0' * 32}/stop"
        assert stranger.post(stop).status_code == 403
        idle = {"idle": "1s"}
        assert stranger.patch("settings", json=idle).status_code == 403

        # A browser that is logged in has cookies; other sites cannot read what must be sent along.
        stranger.get(f"{here.server.url}login")
        stranger.get("state", headers=dict(here.client.headers))
        same = {"Sec-Fetch-Site": "same-origin"}
        assert stranger.get("state", headers=same).status_code == 200
        for other in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.org"}):
            for path in paths:
                assert stranger.get(path, headers=same | other).is_error, other
        assert stranger.post(stop, headers=same).status_code == 403
        assert stranger.patch("settings", headers=same, json=idle).status_code == 403
        own = same | {"X-XSRFToken": stranger.cookies["_xsrf"]}
        assert stranger.post(stop, headers=own | {"Origin": "https://evil.org"}).is_error
        assert stranger.post(stop, headers=own).status_code == 404
        assert stranger.patch("settings", headers=own, json={}).status_code == 200


def test_a_page_hears_of_another_process_at_once(here: Served) -> None:
    with here.events() as states:
        first = next(states)
        assert "elsewhere" not in [it["name"] for it in first["machines"]]
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", OTHER_PROCESS, "elsewhere"], env=here.env, check=True)
        state = next(it for it in states if "elsewhere" in str(it["machines"]))
        # The process itself takes most of it.
        assert time.monotonic() - began < 10
        assert state["spent"]["usd_per_hour"] == 1.0
        (machine,) = state["machines"]
        assert machine["price"] == "$1.00/h (x.org, 2026-11-20)"
    here.ledger().machine_stopped(machine["id"], reason="test")
    assert here.get("state")["spent"]["usd_per_hour"] == 0.0


def test_pages_of_runs_join_without_gap_or_overlap(here: Served) -> None:
    ledger = here.ledger()
    price = Price(2_000_000, "yours", "2026-11-20")
    machine = ledger.intend_machine(name="old", provider="local", price=price, at=MONDAY)
    ledger.machine_started(machine, at=MONDAY)
    numbers = []
    for number in range(60):  # three of each begin at one instant
        run = ledger.open_run(machine, kind="cell", notebook="a.ipynb", at=MONDAY + number // 3)
        ledger.close_run(run, status="done", seconds=1.0)
        numbers.append(str(run))
    ledger.machine_stopped(machine, reason="the end", at=MONDAY + 36)
    found: list[Any] = []
    cursor = ""
    while cursor or not found:
        page = here.get("runs", limit=7, cursor=cursor)
        assert len(page["items"]) <= 7
        found += page["items"]
        cursor = page["next"]
    ours = [it["id"] for it in found if it["machine"] == "old"]
    assert sorted(ours) == sorted(numbers)
    assert [it["opened_at"] for it in found] == sorted(
        (it["opened_at"] for it in found), reverse=True
    )
    # Three at a time share the machine for a second each.
    costs = [it["usd"] for it in found if it["machine"] == "old"]
    assert sum(costs) == pytest.approx(2.0 * 20 / 3600, abs=1e-4)
    rows = here.get("costs", by="machine", since="2026-11-01")
    assert rows["usd"] == pytest.approx(sum(row["usd"] for row in rows["items"]), abs=1e-6)


SCRIPT = """
import sys, time
from pathlib import Path
import mlinfra_sdk
print("begun", flush=True)
print("\\x1b[31mred\\x1b[0m", flush=True)
for step in mlinfra_sdk.track(range(4), label="epochs"):
    while step and not Path(sys.argv[1]).exists():
        time.sleep(0.05)
print("ended", flush=True)
"""


def test_a_machine_and_its_run(here: Served, tmp_path: Path) -> None:
    """Seen while it runs, its output read, extended, interrupted, and stopped."""
    script, mark = here.write("work.py", SCRIPT), tmp_path / "never"
    options = ["machine=busy", "--detach", "--name", "work", "--", str(mark)]
    done = here.mlinfra("run", str(script), *options)
    assert done.returncode == 0, done.stderr
    with here.events() as states:
        machine, run = next(
            (state["machines"][0], state["runs"][0])
            for state in states
            if state["machines"] and any(it["live"] for it in state["runs"])
        )
        assert (machine["name"], machine["reachable"], machine["busy"]) == ("busy", True, True)
        assert machine["usage"][0]["total"] > 0
        ends = {it["cause"]: it["at"] - time.time() for it in machine["ends"]}
        assert ends["idle"] == pytest.approx(900, abs=60)
        assert (run["name"], run["status"], run["machine"]) == ("work", "running", "busy")

        def log() -> Any:
            return here.get(f"runs/{run['id']}/log")

        until(lambda: "red" in log()["text"], "the output")
        first = log()
        assert first["text"].startswith("begun\nred\n") and not first["ended"]
        assert here.get(f"runs/{run['id']}/log", after=first["next"])["text"] == ""

        progress = next(
            it["runs"][0]["progress"] for it in states if it["runs"][0]["progress"] is not None
        )
        assert progress.pop("left") > 0
        assert progress == {"label": "epochs", "unit": "it", "done": 1, "total": 4}
        assert "1/4 it" in here.mlinfra("runs").stdout
        (told,) = json.loads(here.mlinfra("runs", "--json").stdout)
        assert told["progress"].pop("left") > 0
        assert told["progress"] == {"done": 1, "total": 4, "unit": "it"}

        here.post(f"machines/{machine['id']}/extend", {"seconds": 7000})
        assert next(it for it in states if it["machines"] and _idle_end(it) > time.time() + 6000)
        shown = json.dumps([machine, run, *map(here.get, ("state", "machines", "runs"))])
        (config,) = here.home.glob("machines/*/config")
        secret = load_config(config.parent).secret
        hidden = (secret.hex(), base64.b64encode(secret).decode(), here.server.token)
        for text in (*hidden, "handle", "time.sleep"):
            assert text not in shown
        assert here.post(f"runs/{run['id']}/cancel") == {"message": "work is cancelled."}
        ended = next(
            it["runs"][0] for it in states if it["runs"] and it["runs"][0]["status"] != "running"
        )
        assert ended["progress"] is None
        assert ended["status"] == "error" and ended["live"]  # a script's exit status of 130
        assert "KeyboardInterrupt" in log()["text"]
        assert here.post(f"runs/{run['id']}/cancel") == {"message": "work is discarded."}
        assert next(it for it in states if not it["runs"])
        until(lambda: here.client.get(f"runs/{run['id']}/log").status_code == 404, "the end of it")
        assert here.post(f"machines/{machine['id']}/stop") == {"message": "busy is stopped."}
        assert next(it for it in states if not it["machines"])
    here.wait_until_no_agent()
    (record,) = [it for it in here.get("runs")["items"] if it["id"] == run["id"]]
    assert record["status"] == "error" and record["seconds"] > 0


def _idle_end(state: Any) -> float:
    return next(it["at"] for it in state["machines"][0]["ends"] if it["cause"] == "idle")


def test_who_only_looks_keeps_no_machine_alive(here: Served) -> None:
    options = ["machine=short", "idle=3s"]
    done = here.mlinfra("run", str(here.write("one.py", "print(1)")), *options)
    assert done.returncode == 0, done.stderr
    with here.events() as states:
        seen: list[Any] = []
        for state in states:
            now = [it for it in state["machines"] if it["name"] == "short"]
            if not now and seen:
                break
            seen += [it for it in now if it["reachable"]]
        assert seen
    here.wait_until_no_agent()
    (machine,) = [it for it in here.get("machines")["items"] if it["name"] == "short"]
    assert machine["stop_reason"] == "idle for 3 s"


def test_catalog_settings_and_targets(here: Served) -> None:
    page = here.get("catalog", gpu="A10", limit=3)
    assert page["total"] >= 1 and page["items"][0]["gpu"] in ("A10", "A10G")
    assert all(it["source"] and it["date"] for it in page["items"])
    project = here.folder / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text('[tool.mlinfra]\nidle = "7m"\n')
    (idle,) = [it for it in here.get("settings", path="project")["items"] if it["name"] == "idle"]
    assert idle["value"] == "7m" and "pyproject.toml" in idle["origin"]
    for outside in ("..", "/../..", "project/pyproject.toml"):
        reply = here.client.get("settings", params={"path": outside})
        assert reply.status_code == 400, outside
    targets = {it["name"]: it for it in here.get("targets")["items"]}
    assert targets["local"]["ready"] and not targets["ssh"]["ready"] and targets["ssh"]["mend"]
    reply = here.client.get("quotes", params={"gpu": "A1O"})
    assert reply.status_code == 400 and "Did you mean" in reply.json()["message"]
    (quote,) = here.get("quotes", on="local")["items"]
    assert quote["target"] == "local" and quote["usd_per_hour"] == 0.0


def test_settings_are_changed_and_other_pages_hear_of_it(here: Served) -> None:
    file = Path(here.get("settings")["file"])
    assert file == here.home.parents[2] / ".config" / "mlinfra" / "config.toml"
    file.parent.mkdir(mode=0o700, parents=True)
    file.write_text('# ours\nidle = "20m"  # patient\nprice = 0.5\n')
    with here.events() as states:
        before = next(states)["settings"]
        changes = {"idle": "90m", "gpu": "A10", "month_budget": "200"}
        reply = here.client.patch("settings", json=changes)
        assert reply.status_code == 200, reply.text
        assert reply.json() == here.get("settings")
        assert next(it for it in states if it["settings"] != before)
        text = '# ours\nidle = "90m"  # patient\nprice = 0.5\ngpu = "A10"\nmonth_budget = 200\n'
        assert file.read_text() == text
        now = here.get("state")["settings"]
        file.write_text(text.replace("200", "300"))  # by an editor
        assert next(it for it in states if it["settings"] != now)
    items = {it["name"]: it for it in here.get("settings")["items"]}
    assert items["month_budget"]["own"] == items["month_budget"]["value"] == "300"
    idle = items["idle"]
    assert (idle["value"], idle["own"], idle["default"]) == ("1h30m", "1h30m", "15m")
    assert items["gpu"]["writable"] and "A10" in items["gpu"]["suggestions"]
    assert items["time"]["own"] == "" and not items["price"]["writable"]

    text = file.read_text()
    for change, field, said in (
        ({"gpu": "L4", "idle": "soon"}, "idle", "idle=soon in the form is not understood."),
        ({"gpu": "A1O"}, "gpu", "Did you mean"),
        ({"budget": "-1"}, "budget", "budget=-1"),
        ({"price": "1"}, "", "price"),
        ({"idle": 15}, "", "$.idle"),
        ([], "", "expected"),
    ):
        reply = here.client.patch("settings", json=change)
        problem = reply.json()
        assert reply.status_code == 400 and problem["field"] == field, change
        assert said.lower() in problem["message"].lower()
    assert file.read_text() == text
    file.write_text("idle = = 1\n")
    reply = here.client.patch("settings", json={"idle": "5m"})
    assert reply.status_code == 400 and "not valid TOML" in reply.json()["message"]
    assert file.read_text() == "idle = = 1\n"
    file.unlink()
    assert here.client.patch("settings", json={"idle": "5m"}).status_code == 200
    assert file.read_text() == 'idle = "5m"\n' and file.stat().st_mode & 0o777 == 0o600
    assert here.client.patch("settings", json={"idle": ""}).status_code == 200


def test_quotes_tell_what_the_cell_of_a_run_would_take(here: Served) -> None:
    ledger = here.ledger()
    cell = "0123456789abcdef"
    machine = ledger.intend_machine(name="past", provider="local", price=Price.unknown(), at=MONDAY)
    ledger.machine_started(machine, at=MONDAY)
    run = 0
    for seconds in (10.0, 11.0, 12.0):
        run = ledger.open_run(machine, notebook="a.ipynb", cell=cell, at=MONDAY)
        ledger.close_run(run, status="done", seconds=seconds)
    other = ledger.open_run(machine, notebook="a.ipynb", cell="f" * 16, at=MONDAY)
    ledger.close_run(other, status="lost", seconds=5.0)
    ledger.machine_stopped(machine, reason="the end", at=MONDAY + 60)
    ledger.close()
    (quote,) = here.get("quotes", on="local", run=run)["items"]
    estimate = quote["estimate"]
    assert 10 <= estimate["seconds"] <= 12
    assert estimate["low"] < estimate["seconds"] < estimate["high"]
    assert estimate["basis"] == "3 runs of this cell on local"
    # What was cut off tells nothing; and nothing is said of a cell that is not asked about.
    for query in ({"run": other}, {}):
        (quote,) = here.get("quotes", on="local", **query)["items"]
        assert quote["target"] == "local" and quote["estimate"] is None
    for unknown, status in (("999999999", 404), ("last", 400)):
        reply = here.client.get("quotes", params={"on": "local", "run": unknown})
        assert reply.status_code == status and reply.json()["message"]


def test_any_request_gets_a_documented_answer(here: Served, tmp_path: Path) -> None:
    """Schemathesis makes requests of the OpenAPI document, valid and not, and checks answers."""
    document = tmp_path / "openapi.json"
    document.write_text(json.dumps(here.get("openapi.json")))
    command = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"
    done = subprocess.run(
        [
            *(sys.executable, "-c", command, "run", str(document), "--url", here.url.rstrip("/")),
            *("--header", f"Authorization: {here.client.headers['Authorization']}"),
            *("--exclude-path", "/events", "--phases", "coverage,fuzzing", "--seed", "1"),
            *("--max-examples", "3", "--generation-deterministic", "--no-color"),
            # Jupyter says 403 and not 401; whether a text names a GPU no schema can tell.
            *("--exclude-checks", "missing_required_header,positive_data_acceptance"),
        ],
        cwd=tmp_path,
        env=here.env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
