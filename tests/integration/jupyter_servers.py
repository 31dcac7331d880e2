"""Real Jupyter Servers in processes of their own, and a path to them that can be cut."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio
import psutil
from processes import free_port, until

from mlinfra_sdk.providers import bootstrap

TOKEN = "MLINFRA_JUPYTER_TOKEN"
WITHOUT = dict.fromkeys(("jupyterlab", "notebook", "notebook_shim", "jupyter_lsp"), False)
"""Extensions that such a server does without: they take seconds to load."""


def furnished(folder: Path) -> None:
    """Make the environment in this folder for environments of the SDK: a thin one on top of the
    packages here, so that no test waits for an installation."""
    python = folder / bootstrap._shipment().digest
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", python], check=True)
    (packages,) = python.glob("lib/python*/site-packages")
    paths = [path for path in sys.path if path and Path(path).is_dir()]
    (packages / "here.pth").write_text("\n".join(paths))


class JupyterServer:
    """A server with a home, a token and a base_url of its own, and as a rule no terminals."""

    def __init__(self, folder: Path, *options: str, terminals: bool = False) -> None:
        self.home = folder
        self.home.mkdir(parents=True, exist_ok=True)
        self.token = secrets.token_hex(16)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/user/me/"
        self._options = [*options, f"--ServerApp.terminals_enabled={terminals}"]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("JUPYTER", "MLINFRA", "XDG_", "IPYTHON", "PYTHONPATH"))
        }
        with open(self.home / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root"),
                    *(f"--ServerApp.port={self.port}", "--ServerApp.port_retries=0"),
                    *("--ServerApp.base_url=/user/me/", f"--ServerApp.root_dir={self.home}"),
                    f"--ServerApp.jpserver_extensions={WITHOUT}",
                    *self._options,
                ],
                env=kept | {"HOME": str(self.home), "JUPYTER_TOKEN": self.token},
                cwd=self.home,
                stderr=log,
            )
        until(self._answers, "the Jupyter Server", lambda: self.log)

    def _answers(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(self.url + "api"):
            return True
        return False

    @property
    def log(self) -> str:
        return (self.home / "server.log").read_text()

    def kernels(self) -> list[psutil.Process]:
        """The kernels that it runs."""
        assert self._process is not None
        return [
            child
            for child in psutil.Process(self._process.pid).children()
            if "ipykernel_launcher" in child.cmdline()
        ]

    def agents(self) -> list[psutil.Process]:
        """Agents that live in its home."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                command = process.cmdline()
                if "mlinfra_sdk.worker" in command and command[-1].startswith(str(self.home)):
                    found.append(process)
        return found

    def furnish(self) -> None:
        """Make the environment there that the first machine would make."""
        private = self.home / ".cache" / "mlinfra"
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
        furnished(private / "sdk")

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def restart(self, token: str = "") -> None:
        self.stop()
        self.token = token or self.token
        self.start()


@contextmanager
def jupyter_server(folder: Path, *options: str, terminals: bool = False) -> Iterator[JupyterServer]:
    server = JupyterServer(folder, *options, terminals=terminals)
    try:
        yield server
    finally:
        server.stop()


class Cuttable:
    """A TCP port whose connections all lead to another one, until they are cut."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self._target = target
        self._pairs: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.connections = 0

    def __enter__(self) -> Cuttable:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *exc: object) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def cut(self) -> None:
        """Cut every connection now, without a goodbye."""
        self._loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        for pair in self._pairs:
            for writer in pair:
                writer.transport.abort()
        self._pairs.clear()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._accept, "127.0.0.1", self.port)
        )
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            self._pairs.append((writer, far_writer))
            self.connections += 1
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_carry, reader, far_writer)
                tasks.start_soon(_carry, far_reader, writer)
        writer.transport.abort()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()
