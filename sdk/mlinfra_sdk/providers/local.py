"""``on=local``: a worker in its own process on this machine. Needs nothing, costs nothing.

It shares this interpreter and the notebook's folder; with ``isolate`` it has a store and a
folder of its own and everything takes the path that it takes to a distant machine.
"""

from __future__ import annotations

import os
import time
from typing import ClassVar

import msgspec

from mlinfra_sdk import paths
from mlinfra_sdk.ledger import Price
from mlinfra_sdk.providers.base import (
    Capabilities,
    Handle,
    NoOptions,
    Offer,
    Problem,
    limits_of,
)
from mlinfra_sdk.providers.here import AgentsHere
from mlinfra_sdk.providers.shell import argv as shell_argv
from mlinfra_sdk.spec import Request
from mlinfra_sdk.worker import gpus
from mlinfra_sdk.worker.folder import Config

_START_SECONDS = 1.5


class LocalProvider(AgentsHere):
    """Machines that are processes here, each with a directory of its own (0700)."""

    name: ClassVar[str] = "local"
    place: ClassVar[str] = "machines"
    capabilities = Capabilities(hard_stop="worker", shared_fs=True, rented=False)
    options: ClassVar[type[msgspec.Struct]] = NoOptions
    argument: ClassVar = ""

    def __init__(self, options: NoOptions | None = None) -> None:
        pass

    def check(self) -> list[Problem]:
        """Only the state directory can be missing."""
        try:
            self.machines()
        except OSError as error:
            return [Problem(f"The state directory cannot be used: {error}", "set MLINFRA_HOME")]
        return []

    async def offers(self, request: Request) -> list[Offer]:
        """This machine, if it has the GPU that is asked for."""
        gpu = None if request.gpu is None else gpus.require(request.gpu, self.name)
        source = "set by price=" if request.price else "your own machine"
        price = Price(request.price, source, time.strftime("%Y-%m-%d"))
        return [Offer(self.name, gpu, price, _START_SECONDS)]

    def shell(self, handle: Handle) -> list[str]:
        """See :class:`OpensShell`: in the machine's folder."""
        return shell_argv(str(self.machines() / handle.key))

    async def launch(
        self, offer: Offer, request: Request, key: str, previous: Handle | None = None
    ) -> Handle:
        """Start an agent; see :meth:`Provider.launch`."""
        folder = self.machines() / key
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
        return await self.start(folder, config, previous)
