"""``on=local``: a worker in its own process on this machine. Needs nothing, costs nothing.

It shares this interpreter and the notebook's folder; with ``isolate`` it has a store and a
folder of its own and everything takes the path that it takes to a distant machine.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import ClassVar

import anyio
import anyio.to_thread
import msgspec

from mlinfra_sdk import paths
from mlinfra_sdk.errors import LinkClosed, LinkError
from mlinfra_sdk.ledger import Price
from mlinfra_sdk.link.wire import Wire, connect_unix
from mlinfra_sdk.providers.base import (
    Capabilities,
    Handle,
    NoOptions,
    Offer,
    Problem,
    Status,
    limits_of,
)
from mlinfra_sdk.spec import Request
from mlinfra_sdk.worker import gpus, host
from mlinfra_sdk.worker.folder import SOCKET, Config, load_config

_START_SECONDS = 1.5


class LocalProvider:
    """Machines that are processes here, each with a directory of its own (0700)."""

    name: ClassVar = "local"
    capabilities = Capabilities(hard_stop="worker", shared_fs=True, rented=False)
    options: ClassVar[type[msgspec.Struct]] = NoOptions
    argument: ClassVar = ""

    def __init__(self, options: NoOptions | None = None) -> None:
        pass

    def check(self) -> list[Problem]:
        """Only the state directory can be missing."""
        try:
            _machines()
        except OSError as error:
            return [Problem(f"The state directory cannot be used: {error}", "set MLINFRA_HOME")]
        return []

    async def offers(self, request: Request) -> list[Offer]:
        """This machine, if it has the GPU that is asked for."""
        gpu = None if request.gpu is None else gpus.require(request.gpu, self.name)
        source = "set by price=" if request.price else "your own machine"
        price = Price(request.price, source, time.strftime("%Y-%m-%d"))
        return [Offer(self.name, gpu, price, _START_SECONDS)]

    async def launch(
        self, offer: Offer, request: Request, key: str, previous: Handle | None = None
    ) -> Handle:
        """Start an agent; see :meth:`Provider.launch`."""
        folder = _machines() / key
        handle = _handle(folder)
        if await anyio.to_thread.run_sync(host.serves, folder):
            return handle
        store, cwd = paths.data_dir() / "store", os.getcwd()
        if request.isolate:
            store, cwd = folder / "store", str(folder / "work")
        config = Config(
            secret=os.urandom(32),
            store=str(store),
            limits=limits_of(request),
            shared_fs=not request.isolate,
            cwd=cwd,
            prestart=not request.isolate or request.env == "none",
        )
        try:
            host.prepare(folder, config, _folder(previous) if previous is not None else None)
            os.makedirs(cwd, exist_ok=True)
            starting = host.start(folder)
            await anyio.to_thread.run_sync(starting.wait, abandon_on_cancel=True)
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
        return host.status(_folder(handle))

    async def stop(self, handle: Handle) -> None:
        """End the agent and its kernels; see :func:`mlinfra_sdk.worker.host.stop`."""
        await anyio.to_thread.run_sync(host.stop, _folder(handle))

    async def remains(self) -> list[Handle]:
        """Folders of agents that are gone, with runs to be collected."""
        return [_handle(folder) for folder in host.remains(_machines())]

    async def list(self) -> list[Handle]:
        """Every agent that runs here."""
        return [_handle(folder) for folder in host.living(_machines())]


def _handle(folder: Path) -> Handle:
    return Handle(LocalProvider.name, folder.name, {"folder": str(folder)})


def _machines() -> Path:
    folder = paths.data_dir() / "machines"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _folder(handle: Handle) -> Path:
    return Path(handle.data["folder"])
