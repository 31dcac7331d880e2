"""What a backend needs that can run commands on its machines: how, and all that follows from it.

A backend on top of ``exec`` is a :class:`Remote`, which runs a command over there, and a subclass
of :class:`ExecProvider`, which adds ``check``, ``offers`` and ``launch``. Shipping the SDK,
starting the agent, finding it again, reaching it and ending it are common (``bootstrap.py``).
"""

from __future__ import annotations

import abc
import base64
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, TypeVar

import msgspec

from mlinfra_sdk import errors
from mlinfra_sdk.catalog import Device, Gpu, Gpus, describe_devices
from mlinfra_sdk.errors import LinkClosed, LinkError, MlinfraError, ProviderError, RequestError
from mlinfra_sdk.link.processes import skip_to_marker
from mlinfra_sdk.link.relay import MARKER
from mlinfra_sdk.link.wire import Wire
from mlinfra_sdk.providers.base import (
    Capabilities,
    Handle,
    NoOptions,
    Offer,
    Problem,
    Status,
    limits_of,
)
from mlinfra_sdk.providers.shell import argv as shell_argv
from mlinfra_sdk.spec import Request
from mlinfra_sdk.worker.folder import SOCKET, Config
from mlinfra_sdk.worker.host import Answer, Launch

T = TypeVar("T")

PRINTED_MARKER = "".join(f"\\{byte:03o}" for byte in MARKER)
"""The relay's start marker, as sh's printf takes it."""
_LINE_LIMIT = 1 << 20
_END = "mlinfra-end"
_GONE = "Gone"


class ExecWire(Wire, Protocol):
    """The stdin and stdout of a command that runs on a machine. Closing it ends the command."""

    def complaint(self) -> str:
        """The end of what the command wrote to stderr, or what else is known of its failure."""
        ...


class Remote(abc.ABC):
    """A machine, or what will be one, on which commands can be run."""

    where: str
    """What it is called in messages, such as ``ssh:box``."""

    @abc.abstractmethod
    async def exec(self, argv: Sequence[str]) -> ExecWire:
        """Start a command there with binary stdin and stdout. The bootstrap relies neither on the
        command's exit status nor on an end of its stdin. Raises :class:`LinkError`."""

    def interactive(self, argv: Sequence[str]) -> list[str]:
        """The command here that runs one there in this terminal. Raises :class:`ProviderError` if
        there is no such way."""
        raise ProviderError(
            f"{self.where} cannot be entered with a terminal.",
            hint="Run commands in a cell: `%%remote` and `!command`.",
        )

    def explain(self, complaint: str) -> LinkError:
        """What to raise when a command ended before it said anything, having complained so."""
        return LinkError(f"{self.where} cannot be reached: {complaint or 'no answer'}.")


async def read_line(wire: Wire) -> str:
    """A line without its end, and nothing behind it. Raises :class:`LinkError` at the end."""
    line = bytearray()
    space = memoryview(bytearray(1))
    while await wire.receive_into(space):
        if space[0] == ord("\n"):
            return line.decode("utf-8", "replace")
        line += space
        if len(line) > _LINE_LIMIT:
            raise LinkError("It sent a line without end.")
    raise LinkError("It ended before it had said all.")


async def begun(remote: Remote, argv: Sequence[str], text: bytes = b"") -> ExecWire:
    """Run a command that first prints the start marker; ``text`` is what it reads before that.
    Raises :class:`LinkError` with the reason if it does not come so far."""
    wire = await remote.exec(argv)
    try:
        await wire.send([text] if text else [])
        await skip_to_marker(wire)
    except BaseException as error:
        complaint = wire.complaint()
        await wire.aclose()
        if isinstance(error, LinkError):
            raise remote.explain(complaint) from None
        raise
    return wire


def result(line: str, kind: type[T], where: str) -> T:
    """What a command of ``mlinfra_sdk.worker.host`` answered; its error is raised as what it is."""
    try:
        answer = msgspec.json.decode(line, type=Answer)
        if not answer.kind:
            return msgspec.json.decode(answer.result, type=kind)
    except msgspec.MsgspecError:
        raise LinkError(
            f"{where} did not answer as it should: {line[:200]!r}.", hint="Try again."
        ) from None
    error = getattr(errors, answer.kind, ProviderError)
    if not (isinstance(error, type) and issubclass(error, MlinfraError)):
        error = ProviderError
    raise error(f"{where}: {answer.error}", hint=answer.hint)


async def ask(
    remote: Remote, data: Mapping[str, str], command: str, kind: type[T], *keys: str
) -> T:
    """Run a command of ``mlinfra_sdk.worker.host`` there. Raises :class:`_Gone` if the SDK, and so
    the machine, lies there no longer."""
    gone = msgspec.json.encode(Answer(error="it is gone", kind=_GONE)).decode()
    words = ("mlinfra_sdk.worker.host", data["home"], command, *keys)
    wire = await begun(remote, _module(data, f"printf '{PRINTED_MARKER}{gone}\\n'", *words))
    try:
        line = await read_line(wire)
    finally:
        await wire.aclose()
    if line == gone:
        raise _Gone(f"Nothing of ours is left at {remote.where}.")
    return result(line, kind, remote.where)


def _module(data: Mapping[str, str], otherwise: str, *words: str) -> list[str]:
    """A command that runs a module of the SDK there: with the interpreter that was told of once, or
    any other that this user has used there since. If there is none, it does ``otherwise``."""
    look = (
        'p=$0 home=$1; shift; [ -x "$p" ] || for p in "$home"/sdk/*/bin/python; do'
        f' [ -x "$p" ] && break; done; [ -O "$home" ] && [ -x "$p" ] || {{ {otherwise}; exit; }};'
        ' exec "$p" -I -m "$@"'
    )
    return ["sh", "-c", look, data["python"], data["home"], *words]


async def shell(remote: Remote, script: str) -> list[str]:
    """The lines that a script for ``sh`` prints there; it is written in one line, which shells of
    all kinds pass on."""
    wire = await begun(remote, ["sh", "-c", f"printf '{PRINTED_MARKER}'; {script}; echo {_END}"])
    lines: list[str] = []
    try:
        while not lines or lines[-1] != _END:
            lines.append(await read_line(wire))
    finally:
        await wire.aclose()
    return lines[:-1]


async def find(remote: Remote, home: str) -> dict[str, str] | None:
    """``home`` and ``python`` where this user has used the SDK before, whichever version; else
    None."""
    lines = await shell(
        remote,
        f'{set_home(home)}; [ ! -O "$home" ] || for python in "$home"/sdk/*/bin/python; do'
        ' [ -x "$python" ] && printf \'%s\\n\' "$home" "$python" && break; done',
    )
    return dict(zip(("home", "python"), lines, strict=True)) if len(lines) == 2 else None


def set_home(home: str) -> str:
    """A command of sh that sets ``$home`` to the directory for all that is ours there: the one of
    that name, or the user's own place for such things."""
    own = '"${XDG_CACHE_HOME:-$HOME/.cache}/mlinfra"'
    return f"home={shlex.quote(home)}; : ${{home:=${{MLINFRA_HOME:+$MLINFRA_HOME/host}}}}" + (
        f'; [ -n "$home" ] || home={own}'
    )


async def gpu_of(remote: Remote, wanted: Gpus) -> Gpu:
    """What the host has of the wanted GPUs, by its driver. Raises :class:`RequestError` if that is
    nothing."""
    query = "nvidia-smi --query-gpu=memory.total,name --format=csv,noheader,nounits 2>/dev/null"
    devices = []
    for line in await shell(remote, query):
        memory, _, name = line.partition(",")
        if memory.strip().isdigit():
            devices.append(Device(name.strip(), int(memory) << 20))
    found = wanted.found_in(devices)
    if found is None:
        have = describe_devices(devices) or "no NVIDIA GPU"
        raise RequestError(
            f"gpu={wanted} cannot be met by on={remote.where}: the host has {have}.",
            hint="Leave gpu= out to run on its CPU, or name a target that has the GPU.",
        )
    return found


class _Gone(ProviderError):
    pass


class ExecProvider(abc.ABC):
    """A provider whose machines can run commands. A subclass says how (:meth:`remote`), and adds
    ``check``, ``offers`` and ``launch``, which ends in :meth:`start_agent`. One whose machines end
    with the agent, or are stopped by a service, extends :meth:`status` and :meth:`stop`."""

    name: ClassVar[str]
    capabilities: Capabilities
    options: ClassVar[type[msgspec.Struct]] = NoOptions
    argument: ClassVar[str] = ""
    grace: ClassVar[float] = 0.0
    """See :attr:`Config.grace`."""

    @abc.abstractmethod
    def remote(self, data: Mapping[str, str]) -> Remote:
        """How commands are run on the machine with this ``Handle.data``."""

    @abc.abstractmethod
    def check(self) -> list[Problem]:
        """See :meth:`Provider.check`."""

    @abc.abstractmethod
    async def offers(self, request: Request) -> list[Offer]:
        """See :meth:`Provider.offers`."""

    @abc.abstractmethod
    async def launch(
        self, offer: Offer, request: Request, key: str, previous: Handle | None = None
    ) -> Handle:
        """See :meth:`Provider.launch`."""

    async def start_agent(
        self,
        data: Mapping[str, str],
        request: Request,
        key: str,
        previous: Handle | None = None,
        *,
        home: str = "",
        python: str = "",
    ) -> Handle:
        """Start an agent where ``remote(data)`` leads, and check the GPU there. ``home`` is where
        everything is kept, ``python`` the interpreter to use, if they are known. Idempotent on
        ``key``; a failure or a cancellation leaves no agent behind."""
        from mlinfra_sdk.providers.bootstrap import start

        launch = Launch(
            key=key,
            config=Config(
                secret=os.urandom(32),
                store="",
                limits=limits_of(request),
                grace=self.grace,
                prestart=request.env == "none",
            ),
            gpu=request.gpu,
            where=self.name,
            previous=previous.key if previous is not None else "",
        )
        started = await start(self.remote(data), launch, home=home, python=python)
        return Handle(self.name, key, {**data, **started})

    async def connect(self, handle: Handle) -> Wire:
        """Through the relay: the agent's unix socket, over the stdio of a command."""
        remote = self.remote(handle.data)
        socket = f"{handle.data['home']}/machines/{handle.key}/{SOCKET}"
        argv = _module(handle.data, "echo it is gone >&2", "mlinfra_sdk.link.relay", socket)
        try:
            return await begun(remote, argv)
        except LinkClosed:
            raise
        except LinkError:
            status = await self.status(handle)
            if status.alive:
                raise
        raise LinkClosed(f"The machine has ended: {status.reason}.")

    async def secret(self, handle: Handle) -> bytes:
        """From the machine's folder, over the provider's own authentication."""
        encoded = await self._ask(handle, "secret", str)
        return base64.b64decode(encoded)

    async def status(self, handle: Handle) -> Status:
        """As the host tells. A machine that cannot be asked counts as alive: it may cost. So does
        one that was found by its tag, of whose agent nothing is known."""
        if not handle.data.get("python"):
            return Status(True)
        try:
            return (await self._ask(handle, "status", Status)).here()
        except _Gone:
            return Status(False, "its folder is gone")
        except LinkError as error:
            return Status(True, f"it cannot be asked: {error.message}")

    async def stop(self, handle: Handle) -> None:
        """End the agent and its kernels, and remove its folder; what else there is stays."""
        try:
            await self._ask(handle, "stop", type(None))
        except _Gone:
            return

    def shell(self, handle: Handle) -> list[str]:
        """See :class:`OpensShell`."""
        folder = f"{handle.data.get('home', '')}/machines/{handle.key}"
        return self.remote(handle.data).interactive(shell_argv(folder))

    async def remains(self) -> list[Handle]:
        """None: a provider whose disks outlive their machines overrides this."""
        return []

    async def _ask(self, handle: Handle, command: str, kind: type[T]) -> T:
        return await ask(self.remote(handle.data), handle.data, command, kind, handle.key)

    async def list(self) -> list[Handle]:
        """None: a provider that can tell overrides this."""
        return []
