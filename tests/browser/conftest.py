"""A real Jupyter server and Chromium, driven by Node.js scripts with playwright-core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from urllib.parse import urlsplit

import nbformat
import pytest
from environments import on_top

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "artifacts" / "screenshots"
START_S = 60
# The system's browser; where there is none, Playwright looks for one that it installed itself.
CHROMIUM = os.environ.get("CHROMIUM") or which("chromium") or which("google-chrome") or ""
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {
        "checkForUpdates": False,
        "fetchNews": "false",
    },
    # Every cell is in the page, whether it is in view or not.
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}
# A peer that the benchmarks use, with a side bar of its own.
PAGE = {"disabledExtensions": {"ipyparallel-labextension": True}}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Two more tries, shown as reruns in the summary: Chromium and JupyterLab are not ours, and on
    a loaded machine they now and then take longer for a page than any patience. No other test has
    any."""
    if config.pluginmanager.hasplugin("rerunfailures"):
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.flaky(reruns=2))


@dataclass(frozen=True)
class Browser:
    """One Jupyter application with its own folders."""

    app: str
    url: str
    token: str
    folder: Path

    def save(self, name: str, sources: list[str]) -> str:
        """Write a notebook of code cells into the server's folder; return its path there."""
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(source) for source in sources],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        )
        nbformat.write(notebook, self.folder / f"{name}.ipynb")
        return f"{name}.ipynb"

    def run(self, script: str, **environment: str) -> None:
        """Run a script; fail with what it printed if it fails."""
        node = subprocess.run(
            [Path(sys.prefix) / "bin" / "node", Path(__file__).with_name(script)],
            env=os.environ
            | {"APP": self.app, "URL": self.url, "TOKEN": self.token}
            | {"CHROMIUM": CHROMIUM, "SCREENSHOTS": str(SCREENSHOTS), "FOLDER": str(self.folder)}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if node.returncode:
            pytest.fail(f"{script} failed:\n{node.stdout}", pytrace=False)


@pytest.fixture(scope="session")
def jupyter(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], Browser]]:
    """Start ``jupyter lab`` or ``jupyter notebook``, each at most once."""
    running: dict[str, tuple[Browser, subprocess.Popen[bytes]]] = {}

    def start(app: str) -> Browser:
        if app not in running:
            running[app] = start_server(app, tmp_path_factory.mktemp(app))
        return running[app][0]

    yield start
    for _, server in running.values():
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="session")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment with the oldest JupyterLab and Notebook that are supported; all
    else comes from this one."""
    folder = tmp_path_factory.mktemp("oldest") / "venv"
    return on_top(folder, "jupyterlab==4.2.*", "notebook==7.2.*", options=("--no-deps",))


@pytest.fixture
def fresh_jupyter(tmp_path: Path) -> Iterator[Callable[..., Browser]]:
    """Start one whose user has never run anything; ``python`` as :func:`start_server` takes it."""
    running: list[subprocess.Popen[bytes]] = []

    def start(app: str, python: str = sys.executable) -> Browser:
        browser, server = start_server(app, tmp_path, python)
        running.append(server)
        return browser

    yield start
    for server in running:
        server.terminate()
        server.wait(30)


def furnish(home: Path) -> tuple[Path, dict[str, str]]:
    """Folders and settings of a user's own below ``home``: the folder of notebooks, and the
    environment variables that say so to a server."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    folder = home / "work"
    folder.mkdir(exist_ok=True)
    config = home / "config" / "labconfig"
    config.mkdir(parents=True, exist_ok=True)
    (config / "default_setting_overrides.json").write_text(json.dumps(SETTINGS))
    (config / "page_config.json").write_text(json.dumps(PAGE))
    return folder, {
        # Of this environment's extensions, and how they are switched on.
        "JUPYTER_PATH": f"{sys.prefix}/share/jupyter",
        "JUPYTER_CONFIG_PATH": f"{sys.prefix}/etc/jupyter",
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "MLINFRA_HOME": str(home / "mlinfra"),
        "XDG_CONFIG_HOME": str(home / "user"),
    }


def start_server(
    app: str, home: Path, python: str = sys.executable, *, like: Browser | None = None
) -> tuple[Browser, subprocess.Popen[bytes]]:
    """One with its own folders below ``home``. ``python`` may be of an environment that only has
    other versions of some packages, and the rest from this one. It takes the place of the one that
    it is to be ``like``, which has ended."""
    folder, own = furnish(home)
    module, application = {
        "lab": ("jupyterlab", "LabApp"),
        "notebook": ("notebook", "JupyterNotebookApp"),
    }[app]
    command = [python, "-m", module, "--no-browser", "--allow-root"]
    command += [f"--port={urlsplit(like.url).port}" if like else "--port=0"]
    command += [f"--IdentityProvider.token={like.token}"] if like else []
    command += [f"--ServerApp.root_dir={folder}", f"--{application}.expose_app_in_browser=True"]
    log = home / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    information = home / "runtime" / f"jpserver-{server.pid}.json"
    deadline = time.monotonic() + START_S
    while not information.exists() or not information.stat().st_size:
        if server.poll() is not None or time.monotonic() > deadline:
            server.kill()
            pytest.fail(f"jupyter {app} did not start:\n{log.read_text()}", pytrace=False)
        time.sleep(0.1)
    running = json.loads(information.read_text())
    return Browser(app, running["url"], running["token"], folder), server
