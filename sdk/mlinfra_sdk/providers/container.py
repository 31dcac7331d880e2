"""``on=container:IMAGE``: a container of podman or docker on this computer.

Its main process becomes the agent (``worker/spawner.py``), so the container ends and is removed
when the agent ends. A volume for each image keeps the SDK's environment and its chunk store
between containers. Nothing else of this computer is to be seen inside but an empty file, into which
the agent writes why it ends: a container is removed with all that it knew.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import anyio
import msgspec

from mlinfra_sdk.catalog import Device, Gpu, Gpus, describe_devices
from mlinfra_sdk.errors import LinkError, ProviderError, RequestError
from mlinfra_sdk.ledger import Price
from mlinfra_sdk.link.processes import open_process
from mlinfra_sdk.link.wire import ProcessWire
from mlinfra_sdk.paths import data_dir
from mlinfra_sdk.providers.base import Capabilities, Handle, Offer, Problem, Status
from mlinfra_sdk.providers.remote import ExecProvider, Remote
from mlinfra_sdk.providers.waiting import runs, tell
from mlinfra_sdk.spec import Request
from mlinfra_sdk.worker import gpus, host, spawner
from mlinfra_sdk.worker.folder import LAST_WORDS

_HOME = "/mlinfra"
_MACHINES = f"{_HOME}/machines"
_PIPE = "/tmp/mlinfra-agent"
_END = "/mlinfra-end"
_UNCLAIMED = 900
"""Seconds after which a container ends that nobody has given an agent."""
_GRACE = 10
"""Seconds that an agent has to end in order."""
_START_SECONDS = 5.0
_STARTING = 30.0
"""Seconds that a container which exists may take to run."""
_NOT_YET = frozenset({"configured", "created", "initialized"})
_KEY, _USER = "mlinfra.key", "mlinfra.user"


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a target: the ``image``, which needs a POSIX shell with the usual commands and either
    Python of this minor version or uv; the command of the ``engine`` with its own options (default:
    podman, else docker); more words for its ``run`` (``extra``); the ``volume``, a name or a
    folder of this computer; and which ``python`` to use inside."""

    image: str = ""
    engine: str = ""
    extra: list[str] = []
    volume: str = ""
    python: str = ""


class ContainerRemote(Remote):
    """Commands inside of a container."""

    def __init__(self, engine: str, name: str) -> None:
        self.where = f"the container {name}"
        self._engine = engine
        self._name = name

    async def exec(self, argv: Sequence[str]) -> ProcessWire:
        """Beside its main process."""
        spawn = f"{spawner.VARIABLE}={_PIPE}"
        words = ["exec", "--interactive", "--env", spawn, self._name, *argv]
        return await open_process([*shlex.split(self._engine), *words])

    def interactive(self, argv: Sequence[str]) -> list[str]:
        """Beside its main process, too."""
        return [*shlex.split(self._engine), "exec", "--interactive", "--tty", self._name, *argv]


class ContainerProvider(ExecProvider):
    """Containers of one image."""

    name: ClassVar[str] = "container"
    capabilities = Capabilities(hard_stop="worker", rented=False)
    options: ClassVar[type[msgspec.Struct]] = Options
    argument: ClassVar[str] = "image"

    def __init__(self, options: Options | None = None) -> None:
        self._options = options or Options()

    @property
    def _engine(self) -> str:
        return self._options.engine or next(filter(shutil.which, ("podman", "docker")), "podman")

    def check(self) -> list[Problem]:
        """Whether the engine answers."""
        try:
            done = subprocess.run(
                [*shlex.split(self._engine), "ps", "--quiet"], capture_output=True, text=True
            )
        except OSError:
            return [Problem(f"There is no {self._engine} here.", "Install podman or docker.")]
        if done.returncode:
            said = done.stderr.strip().splitlines()
            why = said[-1] if said else f"status {done.returncode}"
            return [Problem(f"{self._engine} does not work: {why}", f"Try: {self._engine} ps")]
        return []

    def remote(self, data: Mapping[str, str]) -> Remote:
        """Commands run in the container."""
        return ContainerRemote(data["engine"], data["name"])

    async def offers(self, request: Request) -> list[Offer]:
        """A container, if this computer has the GPU that is asked for."""
        if not self._options.image:
            raise RequestError(
                "on=container needs an image.",
                hint="Write on=container:IMAGE, or image= in a target.",
            )
        gpu = None if request.gpu is None else _devices(request.gpu)[0]
        source = "set by price=" if request.price else "your own machine"
        price = Price(request.price, source, time.strftime("%Y-%m-%d"))
        return [Offer(self.name, gpu, price, _START_SECONDS)]

    async def launch(
        self, offer: Offer, request: Request, key: str, previous: Handle | None = None
    ) -> Handle:
        """Start a container and an agent in it; see :meth:`Provider.launch`. The image is pulled
        if it is not here."""
        data = {"engine": self._engine, "name": f"mlinfra-{key}"}
        try:
            await self._make(data, key, request)
            runs()
            private = ["exec", data["name"], "chmod", "700", _HOME, _MACHINES]
            await _engine_must(data["engine"], *private)
            return await self.start_agent(
                data, request, key, previous, home=_HOME, python=self._options.python
            )
        except BaseException:
            with anyio.CancelScope(shield=True):
                await _remove(data)
            _end_of(key).unlink(missing_ok=True)
            raise

    async def _make(self, data: Mapping[str, str], key: str, request: Request) -> None:
        """Have the container run, whoever starts it: another launch of this key may be at it."""
        for _ in range(2):
            if await _state(data) == "running":
                return
            tell(f"starting a container of {self._options.image}, which is pulled if need be")
            words = self._run(data["name"], key, request)
            _end_of(key).touch(mode=0o600)
            status, _, err = await _ask_engine(data["engine"], *words)
            if status == 0:
                os.truncate(_end_of(key), 0)  # it may tell of an earlier one of this key
                return
            if "already in use" in err and await _starts(data):
                return
            if "already in use" not in err:
                raise _failed(data["engine"], "run", status, err)
            await _remove(data)  # it has ended, and nobody has removed it
        raise ProviderError(
            f"The container {data['name']} is made and removed by others.", hint="Try again."
        )

    def _run(self, name: str, key: str, request: Request) -> list[str]:
        options = self._options
        volume = (
            options.volume or f"mlinfra-{hashlib.sha256(options.image.encode()).hexdigest()[:12]}"
        )
        words = ["run", "--detach", "--rm", f"--name={name}"]
        words += [f"--label={_KEY}={key}", f"--label={_USER}={os.getuid()}"]
        # What belongs to this machine alone lies in a volume without a name, which goes with it.
        words += [f"--volume={volume}:{_HOME}", f"--volume={_MACHINES}"]
        words += [f"--volume={_end_of(key)}:{_END}:Z", f"--env={LAST_WORDS}={_END}"]
        if request.gpu is not None:
            words += _passed_through(self._engine, _devices(request.gpu)[1])
        main = "\n".join(spawner.script(_PIPE, _UNCLAIMED))
        return [*words, *options.extra, "--entrypoint=sh", options.image, "-c", main]

    async def status(self, handle: Handle) -> Status:
        """As the engine tells; why an agent ended, it has written down itself."""
        try:
            state = await _state(handle.data)
        except LinkError as error:
            return Status(True, f"it cannot be asked: {error.message}")
        if state == "running":
            return await super().status(handle)
        told = host.recorded_end(_end_of(handle.key))
        return told or Status(False, f"its container is {state or 'gone'}")

    async def stop(self, handle: Handle) -> None:
        """End the container, and with it all that it holds but its volume."""
        if await _state(handle.data) == "running":
            grace = f"--time={_GRACE}"
            await _ask_engine(handle.data["engine"], "stop", grace, handle.data["name"])
        await _remove(handle.data)
        _end_of(handle.key).unlink(missing_ok=True)

    async def list(self) -> list[Handle]:
        """Every container of ours that runs."""
        names = await _engine_must(
            self._engine,
            *("ps", f"--filter=label={_USER}={os.getuid()}", "--format={{.Names}}"),
        )
        found = []
        for name in names.split():
            data = {"engine": self._engine, "name": name, "home": _HOME}
            found.append(Handle(self.name, name.removeprefix("mlinfra-"), data))
        return found


def _end_of(key: str) -> Path:
    """The file of this computer into which the agent of a container writes why it ends. As a file
    of its own in the container it can be made neither a link nor a pipe there."""
    folder = data_dir() / "containers"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{key}.json"


def _devices(wanted: Gpus) -> tuple[Gpu, list[int]]:
    """What this computer has of it, and the numbers of these devices."""
    present: list[Device] = gpus.present()
    for wish in wanted.alternatives:
        fitting = wish.found_in(present)
        if fitting:
            numbers = [number for number, it in enumerate(present) if it in fitting][: wish.count]
            return gpus.require(Gpus((wish,)), ContainerProvider.name), numbers
    have = describe_devices(present) or "no NVIDIA GPU"
    raise RequestError(
        f"gpu={wanted} cannot be met by on=container: this computer has {have}.",
        hint="Leave gpu= out to run on its CPU, or name a target that has the GPU.",
    )


def _passed_through(engine: str, numbers: Sequence[int]) -> list[str]:
    """podman takes the names of the Container Device Interface, docker its own option."""
    if os.path.basename(shlex.split(engine)[0]) == "docker":
        listed = ",".join(map(str, numbers))
        return [f'--gpus="device={listed}"']
    return [f"--device=nvidia.com/gpu={number}" for number in numbers]


async def _state(data: Mapping[str, str]) -> str:
    """The engine's word for the state of a container; empty if there is none."""
    words = ["container", "inspect", "--format={{.State.Status}}", data["name"]]
    status, out, err = await _ask_engine(data["engine"], *words)
    if status == 0:
        return out.strip()
    if "no such" in err.lower():
        return ""
    raise LinkError(f"{data['engine']} does not answer: {err.strip()[-500:]}")


async def _starts(data: Mapping[str, str]) -> bool:
    """Whether a container that somebody else has made comes to run."""
    with anyio.move_on_after(_STARTING):
        while (state := await _state(data)) in _NOT_YET:
            await anyio.sleep(0.1)
        return state == "running"
    return False


async def _remove(data: Mapping[str, str]) -> None:
    """End a container and wait until it is gone. No error for one that is."""
    await _ask_engine(data["engine"], "rm", "--force", "--volumes", data["name"])
    if await _state(data):
        raise ProviderError(
            f"The container {data['name']} could not be removed.",
            hint=f"Try: {data['engine']} rm --force {data['name']}",
        )


async def _engine_must(engine: str, *words: str) -> str:
    status, out, err = await _ask_engine(engine, *words)
    if status:
        raise _failed(engine, words[0], status, err)
    return out


def _failed(engine: str, word: str, status: int, err: str) -> ProviderError:
    return ProviderError(
        f"`{engine} {word}` failed: {err.strip()[-500:] or f'status {status}'}",
        hint=f"Try it by hand: {engine} {word} ...",
    )


async def _ask_engine(engine: str, *words: str) -> tuple[int, str, str]:
    try:
        done = await anyio.run_process([*shlex.split(engine), *words], check=False)
    except OSError as error:
        raise LinkError(f"{engine} cannot be run: {error.strerror}.") from None
    return done.returncode, done.stdout.decode(), done.stderr.decode()
