"""``on=local``: a worker in its own process on this machine. Needs nothing, costs nothing.

It shares this interpreter and the notebook's folder; with ``isolate`` it has a store and a
folder of its own and everything takes the path that it takes to a distant machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
import psutil

from mlinfra_sdk import paths
from mlinfra_sdk.errors import LinkClosed, LinkError, ProviderError, RequestError
from mlinfra_sdk.ledger import Price
from mlinfra_sdk.link.wire import Wire, connect_unix
from mlinfra_sdk.providers.base import Capabilities, Handle, Offer, Problem, Status
from mlinfra_sdk.spec import Gpu, Request
from mlinfra_sdk.worker.agent import (
    ENDED,
    SOCKET,
    Config,
    load_config,
    remove_sockets,
    save_config,
)
from mlinfra_sdk.worker.watchdog import Limits

_START_SECONDS = 1.5
_OF_ONE_AGENT = ("pid", "config", SOCKET, ENDED)
_STOP_PATIENCE = 5.0


class LocalProvider:
    """Machines that are processes here, each with a directory of its own (0700)."""

    name = "local"
    capabilities = Capabilities(hard_stop="worker", shared_fs=True)

    def check(self) -> list[Problem]:
        """Only the state directory can be missing."""
        try:
            _machines()
        except OSError as error:
            return [Problem(f"The state directory cannot be used: {error}", "set MLINFRA_HOME")]
        return []

    async def offers(self, request: Request) -> list[Offer]:
        """This machine, if it has the GPU that is asked for."""
        if request.gpu is not None:
            _require_gpu(request.gpu, local_gpus())
        source = "set by price=" if request.price else "your own machine"
        price = Price(request.price, source, time.strftime("%Y-%m-%d"))
        return [Offer(self.name, request.gpu, price, _START_SECONDS)]

    async def launch(
        self, offer: Offer, request: Request, key: str, previous: Handle | None = None
    ) -> Handle:
        """Start an agent; see :meth:`Provider.launch`."""
        folder = _machines() / key
        handle = Handle(self.name, key, {"folder": str(folder)})
        if (await self.status(handle)).alive:
            return handle
        if previous is not None:
            _folder(previous).rename(folder)
            for name in _OF_ONE_AGENT:
                (folder / name).unlink(missing_ok=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        store, cwd = paths.data_dir() / "store", os.getcwd()
        if request.isolate:
            store, work = folder / "store", folder / "work"
            work.mkdir(exist_ok=True)
            cwd = str(work)
        save_config(
            folder,
            Config(
                secret=os.urandom(32),
                store=str(store),
                limits=Limits(idle=request.idle, time=request.time),
                shared_fs=not request.isolate,
                cwd=cwd,
            ),
        )
        try:
            await _start_agent(folder)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.stop(handle)
            raise
        return handle

    async def connect(self, handle: Handle) -> Wire:
        """Over the agent's unix socket (mode 0600)."""
        try:
            return await connect_unix(_folder(handle) / SOCKET)
        except LinkError:
            status = await self.status(handle)
            if status.alive:
                raise
        raise LinkClosed(f"The machine has ended: {status.reason}.")

    async def secret(self, handle: Handle) -> bytes:
        """From the machine's directory, which only this user can read."""
        return load_config(_folder(handle)).secret

    async def status(self, handle: Handle) -> Status:
        """Whether the agent's process lives."""
        folder = _folder(handle)
        if _agent_process(folder) is not None:
            return Status(True)
        with suppress(OSError, msgspec.DecodeError):
            ended = msgspec.json.decode((folder / ENDED).read_bytes())
            return Status(False, str(ended["reason"]), float(ended["at"]))
        return Status(False, "its process is gone")

    async def stop(self, handle: Handle) -> None:
        """End the agent and its kernels, and remove the machine's directory, unless detached runs
        in it wait to be collected."""
        folder = _folder(handle)
        process = _agent_process(folder)
        if process is not None:
            await anyio.to_thread.run_sync(_end, process)
        remove_sockets(folder)
        if not _has_runs(folder):
            shutil.rmtree(folder, ignore_errors=True)

    async def remains(self) -> list[Handle]:
        """Folders of agents that are gone, with runs to be collected."""
        return [
            Handle(self.name, folder.name, {"folder": str(folder)})
            for folder in sorted(_machines().iterdir())
            if _has_runs(folder) and _agent_process(folder) is None
        ]

    async def list(self) -> list[Handle]:
        """Every agent that runs here."""
        return [
            Handle(self.name, folder.name, {"folder": str(folder)})
            for folder in sorted(_machines().iterdir())
            if _agent_process(folder) is not None
        ]


def _has_runs(folder: Path) -> bool:
    return any(folder.glob("runs/*/run.json"))


def local_gpus() -> list[str]:
    """Names of the NVIDIA GPUs of this machine, as NVML gives them."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


def _require_gpu(gpu: Gpu, present: list[str]) -> None:
    """Raise unless this machine has the GPU."""
    wanted = gpu.name.upper()
    # NVML says "NVIDIA A100-SXM4-80GB"; a user writes A100.
    fitting = [name for name in present if wanted in name.upper().replace("-", " ").split()]
    if len(fitting) >= gpu.count:
        return
    have = ", ".join(present) if present else "no NVIDIA GPU"
    raise RequestError(
        f"gpu={gpu} cannot be met by on=local: this machine has {have}.",
        hint="Leave gpu= out to run on this machine's CPU, or name a target that has the GPU.",
    )


def _machines() -> Path:
    folder = paths.data_dir() / "machines"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _folder(handle: Handle) -> Path:
    return Path(handle.data["folder"])


async def _start_agent(folder: Path) -> None:
    """Start the agent as a process of its own session, and wait until it listens."""
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlinfra_sdk.worker", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
        file = os.open(folder / "pid", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(file, "w") as pid:
            pid.write(f"{process.pid} {psutil.Process(process.pid).create_time()}")
        assert process.stdout is not None
        with process.stdout:
            line = await anyio.to_thread.run_sync(process.stdout.readline, abandon_on_cancel=True)
        if line != b"ready\n":
            process.wait()
            stderr.seek(0)
            said = stderr.read().decode(errors="replace").strip()[-2000:]
            raise ProviderError(
                f"The local worker did not start: {said or 'it ended at once'}.",
                hint="`mlinfra doctor` checks the installation.",
            )


def _agent_process(folder: Path) -> psutil.Process | None:
    """The agent's process, unless it is gone or its number belongs to another one now."""
    try:
        pid, created = (folder / "pid").read_text().split()
        process = psutil.Process(int(pid))
        same = abs(process.create_time() - float(created)) < 0.01
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None


def _end(process: psutil.Process) -> None:
    """End an agent and all that it started."""
    with suppress(psutil.NoSuchProcess):
        family = [process, *process.children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(family, timeout=_STOP_PATIENCE)
        for survivor in left:
            with suppress(psutil.NoSuchProcess):
                survivor.kill()
        psutil.wait_procs(left, timeout=_STOP_PATIENCE)
