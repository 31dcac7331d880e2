"""What providers share whose agents are processes of this computer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread

from mlinfra_sdk import paths
from mlinfra_sdk.errors import LinkClosed, LinkError
from mlinfra_sdk.link.unix import connect_unix
from mlinfra_sdk.link.wire import Wire
from mlinfra_sdk.providers.base import Handle, Status
from mlinfra_sdk.worker import host
from mlinfra_sdk.worker.folder import SOCKET, Config, load_config

_launching: WeakValueDictionary[Path, anyio.Lock] = WeakValueDictionary()
"""A launch that finds the agent of another one of its key half started would end it."""


class AgentsHere:
    """The part of a provider that is about agents here, each with a directory of its own (0700)
    below ``place`` of the state directory."""

    name: ClassVar[str]
    place: ClassVar[str]

    def machines(self) -> Path:
        """Where the directories of the machines lie."""
        folder = paths.data_dir() / self.place
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    async def start(self, folder: Path, config: Config, previous: Handle | None) -> Handle:
        """The agent in a folder, started unless it runs; a start that fails leaves nothing."""
        handle = self._handle(folder)
        lock = _launching.setdefault(folder, anyio.Lock())
        async with lock:
            if await anyio.to_thread.run_sync(host.serves, folder):
                return handle
            try:
                before = None if previous is None else _folder(previous)
                host.prepare(folder, config, before)
                if config.cwd:
                    os.makedirs(config.cwd, exist_ok=True)
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
        return [self._handle(folder) for folder in host.remains(self.machines())]

    async def list(self) -> list[Handle]:
        """Every agent of this provider that runs here."""
        return [self._handle(folder) for folder in host.living(self.machines())]

    def _handle(self, folder: Path) -> Handle:
        return Handle(self.name, folder.name, {"folder": str(folder)})


def _folder(handle: Handle) -> Path:
    return Path(handle.data["folder"])
