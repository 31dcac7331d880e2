"""``on=jupyter``: any Jupyter Server by its URL and token, also one of a JupyterHub.

Commands run in one kernel of the server that all our machines there share; the agents that they
start are no children of it and outlive it. Nothing there ends the server itself.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar

import anyio
import anyio.to_thread
import msgspec
from anyio.from_thread import start_blocking_portal

from mlinfra_sdk import credentials
from mlinfra_sdk.errors import MlinfraError, RequestError
from mlinfra_sdk.ledger import Price
from mlinfra_sdk.providers.base import Capabilities, Handle, Offer, Problem
from mlinfra_sdk.providers.remote import ExecProvider, ExecWire, Remote, ask, find, gpu_of
from mlinfra_sdk.spec import Request

if TYPE_CHECKING:
    from mlinfra_sdk.providers.jupyter.server import Server

TOKEN_VARIABLE = "MLINFRA_JUPYTER_TOKEN"
_KEYRING_SERVICE = "mlinfra"
_START_SECONDS = 5.0
_RELEASE_WITHIN = 10.0
_PACKAGES = ("httpx", "websockets")


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a target: the server's ``url``, where its ``token`` is (``env:NAME``, ``file:PATH``,
    ``keyring:SERVICE/USER``), which ``kernelspec`` to start (default: the server's own, if it is a
    Python), where to keep everything there (``home``) and which ``python`` to use."""

    url: str = ""
    token: str = ""
    kernelspec: str = ""
    home: str = ""
    python: str = ""
    plain_http: bool = False


class JupyterRemote(Remote):
    """Commands on the machine of a Jupyter Server."""

    def __init__(self, server: Server, kernel: str = "") -> None:
        from mlinfra_sdk.providers.jupyter.sessions import Sessions

        self.where = f"jupyter:{server.url}"
        self._server = server
        self._sessions = Sessions(server, kernel)

    async def exec(self, argv: Sequence[str]) -> ExecWire:
        """Start a command there by our kernel, which is started if it is not there."""
        from mlinfra_sdk.providers.jupyter.process import open_process
        from mlinfra_sdk.providers.jupyter.server import KernelGone

        try:
            return await open_process(self._server, await self._sessions.kernel(), argv)
        except KernelGone:  # it was ended since the server named it
            return await open_process(self._server, await self._sessions.kernel(), argv)

    async def release(self) -> None:
        """End our kernel there, unless somebody uses it."""
        await self._sessions.release()


Handles = list[Handle]


class JupyterProvider(ExecProvider):
    """Agents on machines where a Jupyter Server runs."""

    name: ClassVar[str] = "jupyter"
    capabilities = Capabilities(hard_stop="none", rented=False)
    options: ClassVar[type[msgspec.Struct]] = Options
    argument: ClassVar[str] = "url"

    def __init__(self, options: Options | None = None) -> None:
        self._options = options or Options()
        if self._options.token:
            credentials.check_reference(self._options.token, f"token of on={self.name}")

    def check(self) -> list[Problem]:
        """Whether the packages are there, and whether the server of a target lets us in."""
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            return [
                Problem(
                    f"on=jupyter needs {' and '.join(missing)}.",
                    "pip install 'mlinfra-sdk[jupyter]'",
                )
            ]
        if not self._options.url:
            return []
        try:
            with start_blocking_portal() as portal:
                portal.call(self._visit)
        except MlinfraError as error:
            return [Problem(error.message, error.hint)]
        return []

    async def _visit(self) -> None:
        from mlinfra_sdk.providers.jupyter.sessions import Sessions

        await Sessions(self._server(self._data()), self._options.kernelspec).python_kernel()

    def _data(self) -> dict[str, str]:
        """What a handle must know of the server."""
        from mlinfra_sdk.providers.jupyter.server import server_url

        if not self._options.url:
            raise RequestError(
                "on=jupyter needs the URL of a Jupyter Server.",
                hint="Write on=jupyter:https://..., or a target in a settings file.",
            )
        bare, token = credentials.take_apart(self._options.url)
        if token:
            raise RequestError(
                f"The url of the target for {bare} has a token, which a settings file must not.",
                hint='Remove it and say where it is by token = "env:NAME" or "keyring:...".',
            )
        data = {"url": server_url(bare)}
        # The token that was taken out of on= is known by the address as it was written.
        data["written"] = bare
        for name in ("token", "kernelspec"):
            if value := getattr(self._options, name):
                data[name] = value
        if self._options.plain_http:
            data["plain_http"] = "yes"
        return data

    def _server(self, data: Mapping[str, str]) -> Server:
        from mlinfra_sdk.providers.jupyter.server import Server

        return Server(data["url"], lambda: _token(data), plain_http=bool(data.get("plain_http")))

    def remote(self, data: Mapping[str, str]) -> JupyterRemote:
        """The server that is named there."""
        return JupyterRemote(self._server(data), data.get("kernelspec", ""))

    async def offers(self, request: Request) -> list[Offer]:
        """The server's machine, if it has the GPU that is asked for."""
        remote = self.remote(self._data())
        try:
            gpu = await gpu_of(remote, request.gpu) if request.gpu is not None else None
        except RequestError:
            await remote.release()
            raise
        source = "set by price=" if request.price else "your own server"
        price = Price(request.price, source, time.strftime("%Y-%m-%d"))
        return [Offer(self.name, gpu, price, _START_SECONDS)]

    async def launch(
        self, offer: Offer, request: Request, key: str, previous: Handle | None = None
    ) -> Handle:
        """Start an agent there; see :meth:`Provider.launch`."""
        data = self._data()
        try:
            return await self.start_agent(
                data, request, key, previous, home=self._options.home, python=self._options.python
            )
        except BaseException:
            with anyio.CancelScope(shield=True):
                await _release(self.remote(data))
            raise

    async def stop(self, handle: Handle) -> None:
        """End the agent, and our kernel if nobody else uses it; the server goes on."""
        await super().stop(handle)
        await _release(self.remote(handle.data))

    async def remains(self) -> list[Handle]:
        """Folders there whose agents are gone, with runs to be collected."""
        return (await self._machines())[1]

    async def list(self) -> list[Handle]:
        """Every agent of ours there."""
        return (await self._machines())[0]

    async def _machines(self) -> tuple[Handles, Handles]:
        """Those that live, and those that have ended."""
        if not self._options.url:
            return [], []
        data = self._data()
        remote = self.remote(data)
        try:
            there = await find(remote, self._options.home)
            if there is None:
                return [], []
            machines = await ask(remote, there, "machines", tuple[list[str], list[str]])
        finally:
            with anyio.CancelScope(shield=True):
                await _release(remote)
        living, ended = (
            [Handle(self.name, key, {**data, **there}) for key in keys] for keys in machines
        )
        return living, ended


async def _release(remote: JupyterRemote) -> None:
    """What cannot be released now costs nothing and is found by the next release."""
    with suppress(MlinfraError), anyio.move_on_after(_RELEASE_WITHIN):
        await remote.release()


async def _token(data: Mapping[str, str]) -> str:
    """Asked anew for each request: a token that was changed is taken up at once."""
    if reference := data.get("token"):
        return await anyio.to_thread.run_sync(credentials.fetch, reference)
    if token := credentials.kept(f"jupyter:{data['written']}") or os.environ.get(
        TOKEN_VARIABLE, ""
    ):
        return token
    return await anyio.to_thread.run_sync(
        functools.partial(credentials.from_keyring, _KEYRING_SERVICE, data["url"], needed=False)
    )
