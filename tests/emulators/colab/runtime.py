"""A runtime: a folder with its own HOME, and a real jupyter_server in it."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil

HEADER = "X-Colab-Runtime-Proxy-Token"
DEVICES = {"T4": ("Tesla T4", "15360"), "A100": ("NVIDIA A100-SXM4-40GB", "40960")}
_START_WITHIN = 60.0

_SETTINGS = """
from pathlib import Path
from jupyter_server.auth.identity import IdentityProvider, User

class ProxyTokens(IdentityProvider):
    def get_user_token(self, handler):
        given = handler.request.headers.get({header!r}, "")
        return User("colab") if given in Path({tokens!r}).read_text().split() else None

c.ServerApp.identity_provider_class = ProxyTokens
c.ZMQChannelsWebsocketConnection.kernel_ws_protocol = ""
c.ServerApp.jpserver_extensions = dict.fromkeys(  # they take seconds to load
    ("ipyparallel", "jupyterlab", "jupyter_lsp", "jupyter_mlinfra", "notebook", "notebook_shim"),
    False,
)
"""

_SMI = """#!/bin/sh
case "$1" in
  --query-gpu=memory.total,name) echo "{memory}, {name}" ;;
  --query-gpu=uuid,memory.total,name) echo "GPU-0, {memory}, {name}" ;;
  *) echo "not recorded: $*" >&2; exit 2 ;;
esac
"""
"""A stand-in for nvidia-smi: recorded answers."""


class Runtime:
    """One that is assigned. ``inner`` is the address by which it gives itself back."""

    def __init__(self, folder: Path, accelerator: str, sdk: Path, inner: str) -> None:
        self.home = folder
        self.endpoint = folder.name
        self.accelerator = accelerator
        self.token = secrets.token_hex(16)
        cache = folder / ".cache" / "mlinfra"
        cache.mkdir(mode=0o700, parents=True)
        (cache / "sdk").symlink_to(sdk)
        programs = folder / "bin"
        programs.mkdir()
        if accelerator in DEVICES:
            name, memory = DEVICES[accelerator]
            (programs / "nvidia-smi").write_text(_SMI.format(name=name, memory=memory))
            (programs / "nvidia-smi").chmod(0o755)
        self._tokens = folder / "tokens"
        self._tokens.write_text(self.token)
        settings = folder / "settings.py"
        settings.write_text(_SETTINGS.format(header=HEADER, tokens=str(self._tokens)))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        foreign = ("JUPYTER", "MLINFRA", "XDG_", "IPYTHON", "PYTHONPATH", "MODAL")
        kept = {name: it for name, it in os.environ.items() if not name.startswith(foreign)}
        # What runtimes were seen to set (2026-10-02), as far as programs of ours could care.
        observed = {
            "TBE_RUNTIME_ADDR": f"{inner}/{self.endpoint}",
            "UV_SYSTEM_PYTHON": "true",
            "UV_CONSTRAINT": "",
            "PYTHONPATH": "/env/python",
        }
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        with open(folder / "server.log", "wb") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-m", "jupyter_server", "--no-browser"),
                    *("--allow-root", f"--config={settings}", f"--ServerApp.port={port}"),
                    *("--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}"),
                ],
                env=kept | observed | {"HOME": str(folder), "PATH": path},
                cwd=folder,
                stderr=log,
            )
        end = time.monotonic() + _START_WITHIN
        while not self._answers():
            assert time.monotonic() < end, (folder / "server.log").read_text()
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/api"):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def renew(self) -> None:
        """Let nobody in with the token that was given so far."""
        self.token = secrets.token_hex(16)
        self._tokens.write_text(self.token)

    def cut(self) -> None:
        """End every kernel of the server, and so what goes through them."""
        for child in psutil.Process(self._process.pid).children():
            child.kill()

    def agents(self) -> list[psutil.Process]:
        """Agents of ours in it."""
        return [it for it in self._processes() if "mlinfra_sdk.worker" in it.cmdline()]

    def end(self) -> None:
        """Take everything away."""
        self._process.kill()
        for process in self._processes():
            with suppress(psutil.Error):
                process.kill()
        self._process.wait()

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("HOME") == str(self.home):
                    found.append(process)
        return found
