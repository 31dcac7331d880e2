"""Servers of the users of a real JupyterHub, behind its proxy."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from processes import NODE, free_ports, until

from .conftest import ROOT, Browser, furnish

CONFIG = """\
c = get_config()
c.JupyterHub.bind_url = "http://127.0.0.1:{ports[0]}/"
c.JupyterHub.hub_port = {ports[1]}
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{ports[2]}"
c.ConfigurableHTTPProxy.command = {proxy}
c.JupyterHub.authenticator_class = "dummy"
c.Authenticator.allow_all = True
c.DummyAuthenticator.password = "{word}"
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = "{home}"
c.Spawner.args = ["--allow-root", "--LabApp.expose_app_in_browser=True"]
c.Spawner.notebook_dir = "{folder}"
c.Spawner.environment = {environment}
c.JupyterHub.services = [dict(name="tests", api_token="{token}")]
c.JupyterHub.load_roles = [
    dict(name="tests", services=["tests"], scopes=["admin:users", "tokens", "access:servers"])
]
"""


class Hub:
    """One with folders of its own; ``api`` has the right to do everything in it."""

    def __init__(self, home: Path) -> None:
        self.home, self.word, self.token = home, secrets.token_hex(8), secrets.token_hex(16)
        self.folder, environment = furnish(home)
        ports = free_ports(3)
        self.url = f"http://127.0.0.1:{ports[0]}/"
        config = CONFIG.format(
            ports=ports,
            proxy=[NODE, f"{ROOT / 'node_modules' / '.bin' / 'configurable-http-proxy'}"],
            word=self.word,
            home=home,
            folder=self.folder,
            environment=environment,
            token=self.token,
        )
        (home / "jupyterhub_config.py").write_text(config)
        with open(home / "hub.log", "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jupyterhub"], cwd=home, stdout=log, stderr=log
            )
        self.api = self.client(self.token)
        until(self._answers, "the hub", (home / "hub.log").read_text)

    def client(self, token: str) -> httpx.Client:
        headers = {"Authorization": f"token {token}"} if token else {}
        return httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=30)

    def _answers(self) -> bool:
        with suppress(httpx.TransportError):
            return self.api.get("hub/api/").is_success
        return False

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(tmp_path)
    yield hub
    hub.stop()


def test_a_user_of_a_hub(hub: Hub) -> None:
    browser = Browser("lab", f"{hub.url}user/alice/", "", hub.folder)
    path = browser.save("hub", ["%%remote\nprint(6 * 7)"])
    browser.run("hub.mjs", NOTEBOOK=path, HUB=hub.url, PASSWORD=hub.word)

    # Programs come in by tokens of the hub, strangers and other users do not.
    state = "user/alice/mlinfra/state"
    assert hub.api.get(state).json()["machines"] == []
    assert hub.api.get("user/alice/mlinfra/runs").json()["items"][0]["status"] == "done"
    with hub.api.stream("GET", "user/alice/mlinfra/events") as reply:
        told = next(line for line in reply.iter_lines() if line.startswith("data: "))
        assert json.loads(told[6:])["machines"] == []
    hub.api.post("hub/api/users/bob").raise_for_status()
    bob = hub.api.post("hub/api/users/bob/tokens").json()["token"]
    for other in ("", bob):
        with hub.client(other) as stranger:
            assert stranger.get(state).status_code == 403
            refused = stranger.patch("user/alice/mlinfra/settings", json={"idle": "1s"})
            assert refused.status_code == 403
