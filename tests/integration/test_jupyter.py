"""Cells on real Jupyter Servers, through a session and through the magics."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import keyring
import pytest
from faulty import Client, Recorder, Work, client
from jupyter_servers import TOKEN, Cuttable, JupyterServer, jupyter_server
from keyrings.alt.file import PlaintextKeyring
from live import opened, until

from mlinfra_sdk.catalog import parse_gpus
from mlinfra_sdk.errors import MlinfraError, ProviderError, RequestError
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.providers.jupyter import JupyterProvider, Options
from mlinfra_sdk.spec import Request

Serve = Callable[..., JupyterServer]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    """One server for all tests that do not harm it; nothing of ours may be left there."""
    with jupyter_server(tmp_path_factory.mktemp("jupyter"), terminals=True) as server:
        server.furnish()
        yield server
        until(lambda: not server.kernels(), "our kernels' end")
        assert not server.agents()


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts servers of a test's own."""
    with ExitStack() as stack:

        def start(*options: str) -> JupyterServer:
            server = stack.enter_context(jupyter_server(tmp_path / "server", *options))
            server.furnish()
            monkeypatch.setenv(TOKEN, server.token)
            return server

        yield start


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live: JupyterServer) -> Path:
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv(TOKEN, live.token)
    return tmp_path / "state"


def test_a_cell(live: JupyterServer) -> None:
    with client(on=f"jupyter:{live.url}") as it:
        it.namespace["data"] = list(range(10))
        recorder = Recorder()
        it.run("import os\ntotal = sum(data)\nprint(os.getcwd(), total)", recorder)
        assert it.namespace["total"] == 45
        assert recorder.text.startswith(str(live.home))
        assert len(live.kernels()) == 1
    until(lambda: not live.kernels(), "our kernel's end")
    assert not live.agents()


def test_in_a_notebook(live: JupyterServer, tmp_path: Path) -> None:
    """An address as it is copied from a browser: its token gets nowhere."""
    os.environ.pop(TOKEN)
    with opened(tmp_path / "notebook") as notebook:
        target = f"on=jupyter:{live.url}lab?token={live.token}"
        cell = notebook.run(f"%%remote {target}\nimport os\nhere = os.getcwd()\nprint(1 + 1)")
        assert cell.stdout == "2\n"
        assert str(live.home) in notebook.evaluate("here")
        said = str([*cell.outputs, *cell.cards]) + notebook.run("%remote status").stdout
        assert live.token not in said
        again = notebook.run(f"%%remote {target}\nlen(here)")
        assert again.result == str(len(notebook.evaluate("here")) - 2)
        notebook.run("%remote stop")
        for path in notebook.home.rglob("*"):
            assert not path.is_file() or live.token.encode() not in path.read_bytes(), path


def test_a_cut_in_the_middle(live: JupyterServer) -> None:
    """The run goes on; each output comes once and in order."""
    work, recorder = Work(4000, pause=0.1), Recorder()
    with Cuttable(live.port) as path, ExitStack() as stack:
        url = live.url.replace(str(live.port), str(path.port))
        it = stack.enter_context(client(on=f"jupyter:{url}"))
        thread = threading.Thread(target=it.run, args=(work.code, recorder))
        thread.start()
        for enough in (5, 40, 80):
            until(lambda enough=enough: len(recorder.records) > enough, "its outputs")
            path.cut()
        thread.join(100)
        assert not thread.is_alive()
        assert it.namespace["work_total"] == work.total
    assert work.problems(recorder.records) == []


def test_the_server_is_restarted_with_another_token(serve: Serve) -> None:
    """Its kernels end with it, the machine does not; a new token is taken up."""
    server = serve()
    work, recorder = Work(3000, pause=0.02), Recorder()
    with client(on=f"jupyter:{server.url}") as it:
        thread = threading.Thread(target=it.run, args=(work.code, recorder))
        thread.start()
        until(lambda: len(recorder.records) > 10, "its first outputs")
        (agent,) = server.agents()
        server.stop()
        os.environ[TOKEN] = "5" * 32
        server.restart(token="5" * 32)
        thread.join(100)
        assert not thread.is_alive()
        assert server.agents() == [agent]
        assert it.namespace["work_total"] == work.total
    assert work.problems(recorder.records) == []
    assert not server.agents()


def test_the_token_expires_in_the_middle(serve: Serve) -> None:
    """The run goes on there, and is brought back with a token that is right."""
    server = serve()
    with client(on=f"jupyter:{server.url}") as it:
        gate = server.home / "gate"
        code = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\nx = 5"
        run = it.start(code)
        until(lambda: server.agents(), "the machine")
        server.restart(token="6" * 32)
        with pytest.raises(MlinfraError, match="refuses the token"):
            run.result()
        os.environ[TOKEN] = "6" * 32
        gate.touch()
        it.run("y = x + 1")
        assert it.namespace["y"] == 6


CHILD = """
import os, sys
sys.path[:0] = {path!r}
from faulty import Client
from mlinfra_sdk.spec import Request
it = Client(Request(on={on!r}, machine="shared"))
it.run("x = 42")
print("ready", flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_killed_clients_machine_is_found_again(live: JupyterServer) -> None:
    on = f"jupyter:{live.url}"
    child = subprocess.run(
        [sys.executable, "-c", CHILD.format(path=sys.path, on=on)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert child.stdout == "ready\n", child.stderr
    (agent,) = live.agents()
    ledger = Ledger.open()
    try:
        (machine,) = ledger.machines(active=True)
        assert live.token not in machine.handle
    finally:
        ledger.close()
    with client(on=on, machine="shared") as it:
        it.run("y = 1")
        assert live.agents() == [agent]
    until(lambda: not live.agents(), "its end")


# -- refusals ------------------------------------------------------------------------------------


def test_a_wrong_token(live: JupyterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "not-the-token")
    it = Client(Request(on=f"jupyter:{live.url}"))
    with pytest.raises(ProviderError, match="refuses the token") as caught:
        it.run("1")
    assert "not-the-token" not in str(caught.value)
    assert not live.kernels()


def test_a_gpu_that_is_not_there(live: JupyterServer) -> None:
    it = Client(Request(on=f"jupyter:{live.url}", gpu=parse_gpus("A100")))
    with pytest.raises(RequestError, match="A100"):
        it.run("1")
    until(lambda: not live.kernels(), "our kernel's end")
    assert not live.agents()


def check(**options: object) -> list[str]:
    return [problem.what for problem in JupyterProvider(Options(**options)).check()]


def test_the_doctor_visits_the_server(live: JupyterServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(url=live.url) == []
    (said,) = check(url=live.url, kernelspec="julia")
    assert "no Python kernel 'julia'" in said
    monkeypatch.setenv(TOKEN, "wrong")
    (said,) = check(url=live.url)
    assert "refuses the token" in said
    assert not live.kernels()


def test_where_the_token_may_be(
    live: JupyterServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN)
    monkeypatch.setenv("HUB_TOKEN", live.token)
    assert check(url=live.url, token="env:HUB_TOKEN") == []
    (said,) = check(url=live.url, token="env:NO_TOKEN")
    assert "NO_TOKEN is not set" in said
    file = tmp_path / "token"
    file.write_text(live.token + "\n")
    assert check(url=live.url, token=f"file:{file}") == []
    monkeypatch.setattr(PlaintextKeyring, "file_path", str(tmp_path / "keyring"))
    before = keyring.get_keyring()
    keyring.set_keyring(PlaintextKeyring())
    try:
        (said,) = check(url=live.url)
        assert "refuses the token" in said
        keyring.set_password("mlinfra", live.url, live.token)
        assert check(url=live.url) == []
        keyring.set_password("hub", "me", live.token)
        assert check(url=live.url, token="keyring:hub/me") == []
    finally:
        keyring.set_keyring(before)


def test_a_settings_file_holds_no_token(live: JupyterServer) -> None:
    with pytest.raises(RequestError, match="not the secret itself") as caught:
        check(url=live.url, token=live.token)
    (said,) = check(url=f"{live.url}?token={live.token}")
    assert "has a token" in said
    assert live.token not in said + str(caught.value)
