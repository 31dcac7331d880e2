"""The provider: how runtimes are assigned, reached, looked at and given back."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import anyio
import msgspec
from anyio.from_thread import start_blocking_portal

from mlinfra_sdk import paths
from mlinfra_sdk.catalog import Gpu
from mlinfra_sdk.errors import LinkClosed, LinkError, MlinfraError, NoCapacity, RequestError
from mlinfra_sdk.providers.base import Capabilities, Handle, Offer, Problem, Status
from mlinfra_sdk.providers.colab import offers as market
from mlinfra_sdk.providers.colab.account import LOG_IN, Account, Runtime, Usage, login
from mlinfra_sdk.providers.remote import ExecProvider, ExecWire, Remote, shell
from mlinfra_sdk.spec import Request

if TYPE_CHECKING:
    from mlinfra_sdk.providers.jupyter.server import Server

_START_SECONDS = 60.0
_PATIENCE = 600
"""Seconds that a runtime waits for an agent; then whoever asked for it has died."""
_ROLL_BACK = 300.0
"""Seconds for a call that cannot be taken back, and then for its result to be."""
_PACKAGES = ("httpx", "websockets")
_HEADER = "X-Colab-Runtime-Proxy-Token"
_TERMS = (
    "Google may end Colab runtimes at any time; with no compute units left its terms do not allow "
    "remote control that goes around its notebooks "
    "(https://research.google.com/colaboratory/faq.html)."
)


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a target: a ``tpu`` for cells without ``gpu=``, a machine with more memory where there is
    a choice (``high_memory``), and how Google's client logs in (``auth``; default: whatever login
    is here)."""

    tpu: Literal["", "v5e1", "v6e1"] = ""
    high_memory: bool = False
    auth: Literal["", "oauth2", "adc"] = ""


class ColabRemote(Remote):
    """Commands in a runtime, by its Jupyter Server."""

    def __init__(self, account: Account, endpoint: str) -> None:
        self.where = f"colab:{endpoint}"
        self._account = account
        self._endpoint = endpoint

    async def exec(self, argv: Sequence[str]) -> ExecWire:
        """Start a command there. Raises :class:`LinkClosed` if Colab says that the runtime is
        gone: what its proxy says is not believed, which also refuses tokens that have ended."""
        url, _ = await self._account.access(self._endpoint)
        try:
            return await self._exec(url, argv)
        except LinkClosed:
            raise
        except MlinfraError as error:
            url, _ = await self._account.access(self._endpoint, fresh=True)
            if isinstance(error, LinkError):
                raise
        return await self._exec(url, argv)

    async def _exec(self, url: str, argv: Sequence[str]) -> ExecWire:
        from mlinfra_sdk.providers.jupyter.process import open_process
        from mlinfra_sdk.providers.jupyter.sessions import Sessions

        server = self._server(url)
        return await open_process(server, await Sessions(server).kernel(), argv)

    def _server(self, url: str) -> Server:
        from mlinfra_sdk.providers.jupyter.server import Server

        async def token() -> str:
            return (await self._account.access(self._endpoint))[1]

        return Server(url, token, header=_HEADER, scheme="")


Handles = list[Handle]


class ColabProvider(ExecProvider):
    """Machines that are runtimes of Google Colab."""

    name: ClassVar[str] = "colab"
    capabilities = Capabilities(hard_stop="provider")
    options: ClassVar[type[msgspec.Struct]] = Options
    argument: ClassVar[str] = ""

    def __init__(self, options: Options | None = None) -> None:
        self._options = options or Options()
        self._usage: Usage | None = None

    @property
    def _account(self) -> Account:
        return Account(self._options.auth)

    def check(self) -> list[Problem]:
        """Whether the packages are there, and whether Colab lets us in."""
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            what = f"on=colab needs {' and '.join(missing)}."
            return [Problem(what, "pip install 'mlinfra-sdk[colab]'")]
        if not (self._options.auth or login()):
            return [Problem("There is no login for Colab.", LOG_IN)]
        try:
            with start_blocking_portal() as portal:
                self._usage = portal.call(self._account.usage)
        except MlinfraError as error:
            return [Problem(error.message, error.hint)]
        return []

    def remaining(self) -> str:
        """The compute units that the last :meth:`check` heard of, for ``mlinfra doctor``."""
        return str(self._usage) if self._usage is not None else ""

    def remote(self, data: Mapping[str, str]) -> Remote:
        """The runtime that is named there."""
        return ColabRemote(Account(data["auth"]), data["endpoint"])

    async def offers(self, request: Request) -> list[Offer]:
        """What Colab has of what is wanted. Whether it is to be had shows when it is asked for."""
        if self._options.tpu and request.gpu is not None:
            raise RequestError(
                f"gpu={request.gpu} was asked for, but the target has a TPU.",
                hint="Take on=colab, or leave gpu= out.",
            )
        gpus: Sequence[Gpu | None] = [None] if request.gpu is None else market.fits(request.gpu)
        usage = await self._account.usage()
        note = market.note(usage)
        if not _terms_shown().exists():
            note = f"{note} {_TERMS}"
        return [
            Offer(self.name, gpu, market.price(gpu, usage), _START_SECONDS, note) for gpu in gpus
        ]

    async def launch(
        self, offer: Offer, request: Request, key: str, previous: Handle | None = None
    ) -> Handle:
        """Have a runtime assigned and start an agent in it; see :meth:`Provider.launch`. What an
        earlier one had is gone with it."""
        account = self._account
        data = {"endpoint": "", "auth": account.auth or login()}
        _write_record(key, data)
        try:
            runtime = await self._assign(account, offer, key)
            data["endpoint"] = runtime.endpoint
            _write_record(key, data)
            _terms_shown().touch(mode=0o600)
            await shell(self.remote(data), _guard(key))
            handle = await self.start_agent(data, request, key)
        except BaseException:
            with anyio.CancelScope(shield=True), anyio.move_on_after(_ROLL_BACK):
                await self._end(key, data)
            raise
        return handle

    async def _assign(self, account: Account, offer: Offer, key: str) -> Runtime:
        """The runtime of this key, with what is offered. The call is not cancelled: Colab could
        have got it, and assign the runtime when nobody looks any more."""
        variant, accelerator = "DEFAULT", "NONE"
        if offer.gpu is not None:
            variant, accelerator = "GPU", market.ACCELERATORS[offer.gpu.name]
        elif self._options.tpu:
            variant, accelerator = "TPU", market.TPUS[self._options.tpu]
        assigning = asyncio.ensure_future(
            account.assign(key, variant, accelerator, self._options.high_memory)
        )
        try:
            runtime, usage = await asyncio.shield(assigning)
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True), anyio.move_on_after(_ROLL_BACK):
                await asyncio.wait([assigning])
                assigning.exception()  # it has been dealt with
            raise
        if runtime.accelerator != accelerator:
            raise NoCapacity(
                f"Colab has no {accelerator} for you now: it gave {runtime.accelerator} instead.",
                hint="Try again later, or take another GPU (gpu=L4|T4).",
            )
        market.learn(offer.gpu, usage)
        return runtime

    async def status(self, handle: Handle) -> Status:
        """As Colab tells of the runtime, and the runtime of its agent."""
        try:
            runtimes = await Account(handle.data["auth"]).runtimes()
        except MlinfraError as error:
            return Status(True, f"it cannot be asked: {error.message}")
        if handle.data["endpoint"] not in runtimes:
            return Status(False, "Colab has taken it back, or it was ended")
        found = await super().status(handle)
        if not found.alive:  # without its agent it is of no use, and costs all the same
            with suppress(MlinfraError):
                await self.stop(handle)
        return found

    async def stop(self, handle: Handle) -> None:
        """Give the runtime back."""
        await self._end(handle.key, handle.data)

    async def list(self) -> Handles:
        """Runtimes that were assigned from this computer. Others of the account may be those of
        the browser, and are left alone."""
        found: Handles = []
        records = list(_records().glob("*.json"))
        if not records:
            return found
        runtimes = await self._account.runtimes()
        for path in records:
            with suppress(FileNotFoundError):  # another process has just ended it
                data = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
                if not data["endpoint"]:  # its launch goes on, or was killed
                    data["endpoint"] = await self._account.find(path.stem)
                elif data["endpoint"] not in runtimes:
                    path.unlink()
                if data["endpoint"] in runtimes:
                    found.append(Handle(self.name, path.stem, data))
        return found

    async def _end(self, key: str, data: Mapping[str, str]) -> None:
        """Give back whatever has this key; returns when Colab lists it no longer."""
        account = Account(data["auth"])
        endpoint = data["endpoint"] or await account.find(key)
        if endpoint:
            await account.unassign(endpoint)
        (_records() / f"{key}.json").unlink(missing_ok=True)


def _guard(key: str) -> str:
    """A command that starts, in a session of its own, what gives the runtime back when the agent
    of this key has ended or none has come; by the call that google.colab.runtime.unassign makes."""
    wait = Path(__file__).parent.with_name("guard.sh").read_text()
    call = "import os, urllib.request as r; r.urlopen(r.Request('http://%s/unassign' % "
    call += "os.environ['TBE_RUNTIME_ADDR'], method='POST'))"
    words = ["sh", "-c", 'sh -c "$1" guard "$2" "$3"; exec python3 -c "$4"', "guard"]
    command = shlex.join([*words, wait, key, str(_PATIENCE), call])
    return f"(setsid {command} >/dev/null 2>&1 </dev/null &)"


def _records() -> Path:
    """The folder that says which runtimes are ours: Colab keeps neither names nor tags."""
    folder = paths.data_dir() / "colab"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _write_record(key: str, data: Mapping[str, str]) -> None:
    fd, temporary = tempfile.mkstemp(dir=_records())  # 0600
    with open(fd, "wb") as file:
        file.write(msgspec.json.encode(data))
    os.replace(temporary, _records() / f"{key}.json")


def _terms_shown() -> Path:
    return _records() / "terms-shown"
