"""The provider: how sandboxes are made, found, looked at and ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import anyio
import anyio.to_thread
import msgspec

from mlinfra_sdk import units
from mlinfra_sdk.catalog import Gpu, Rate
from mlinfra_sdk.errors import LinkError, MlinfraError, ProviderError, RequestError
from mlinfra_sdk.ledger import Price
from mlinfra_sdk.link.wire import Wire
from mlinfra_sdk.providers import packages
from mlinfra_sdk.providers.base import (
    Bill,
    Capabilities,
    Handle,
    Offer,
    Problem,
    Status,
    longest,
)
from mlinfra_sdk.providers.modal import bills, rates, tunnel
from mlinfra_sdk.providers.modal.errors import INSTALL, LOG_IN, has_token, missing, translated
from mlinfra_sdk.providers.modal.wire import SandboxRemote, detach, environment
from mlinfra_sdk.providers.remote import ExecProvider, Remote
from mlinfra_sdk.spec import Request

if TYPE_CHECKING:
    from modal import App, Image, Sandbox

_SUPPORTED = ("1.6", "1.7")
_START_SECONDS = 20.0
_LONGEST = 24 * 3600
_MARGIN = 600
"""Seconds that Modal's own limits are behind the agent's: they are for when that has failed."""
_IDLE_MARGIN = 120
_PATIENCE = 600
"""Seconds that a sandbox waits for an agent; then whoever launched it has died."""
_ROLL_BACK = 60.0
_SWEEP = 1.0
_CHECK_SECONDS = 10.0
_TAG = "mlinfra"
_VOLUME = "/root/mlinfra"
_closed_tunnels: set[str] = set()
"""Addresses that lead nowhere while the machine can be reached by a command."""
_EXITS = {
    20: "no agent was started in it",
    21: "it was idle",
    22: "its time was over",
    23: "no client was heard of for too long",
    24: "its agent has ended",
    25: "its budget was spent",
    124: "it reached Modal's time limit",
    137: "it was stopped, or Modal took it back",
}


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a target: ``cpu`` cores and ``memory`` that are guaranteed (more is billed when it is
    used), ``region``, the names of Modal ``secrets`` that are put in the environment, the Modal
    ``app`` that owns the sandboxes, the ``volume`` at ``~/mlinfra`` (empty: none), and whether data
    may go through a ``tunnel`` of Modal's, which is a public address of the machine."""

    cpu: float = 1.0
    memory: str = "4GiB"
    region: str = ""
    secrets: tuple[str, ...] = ()
    app: str = "mlinfra"
    volume: str = "mlinfra"
    tunnel: bool = True


class ModalProvider(ExecProvider):
    """Machines that are Modal sandboxes."""

    name: ClassVar[str] = "modal"
    capabilities = Capabilities(hard_stop="provider")
    options: ClassVar[type[msgspec.Struct]] = Options
    argument: ClassVar[str] = ""

    def __init__(self, options: Options | None = None) -> None:
        self._options = options or Options()

    def check(self) -> list[Problem]:
        """Whether the package is there, and whether the account's token is accepted."""
        absent = missing()
        if absent is not None:
            return [Problem("The package modal is not installed.", INSTALL)]
        if not has_token():
            return [Problem("There is no token for Modal.", LOG_IN)]
        import modal
        from packaging.version import Version

        found = Version(modal.__version__)
        if not Version(_SUPPORTED[0]) <= found < Version(_SUPPORTED[1]):
            return [Problem(f"modal {found} is not one that this was made for.", INSTALL)]
        try:
            with translated():
                _within(_CHECK_SECONDS, lambda: modal.Client.from_env().hello())
        except ProviderError as error:
            return [Problem(error.message, error.hint or LOG_IN)]
        except LinkError as error:
            return [Problem(error.message, error.hint)]
        return []

    def remote(self, data: Mapping[str, str]) -> Remote:
        """The sandbox of this handle."""
        return SandboxRemote(data["sandbox"])

    def _memory(self) -> int:
        try:
            return units.parse_size(self._options.memory)
        except ValueError:
            raise RequestError(
                f"memory = {self._options.memory!r} of a modal target is not understood.",
                hint='Write a size with a unit, such as "8GiB".',
            ) from None

    async def offers(self, request: Request) -> list[Offer]:
        """A sandbox with each GPU that fits, or without, at the account's own rates if it may see
        them, else at the listed ones."""
        memory = self._memory()
        _seconds_of(request)
        if request.gpu is None:
            price = rates.machine_price(self._options.cpu, memory, None)
            return [Offer(self.name, None, price, _START_SECONDS)]
        rates.fits(request.gpu)
        await rates.refresh()
        return [
            Offer(
                self.name,
                fit.gpu,
                rates.machine_price(self._options.cpu, memory, fit),
                _START_SECONDS,
            )
            for fit in rates.fits(request.gpu)
        ]

    async def rates(self) -> list[Rate]:
        """The account's own rates, for ``mlinfra catalog --refresh``."""
        return await rates.ask()

    async def launch(
        self, offer: Offer, request: Request, key: str, previous: Handle | None = None
    ) -> Handle:
        """Make a sandbox and start an agent in it; see :meth:`Provider.launch`. What an earlier
        machine had outside of the volume is gone with it."""
        seconds = _seconds_of(request, offer.price)
        with translated():
            from modal.stream_type import StreamType
        try:
            with translated():
                sandbox = await self._sandbox(offer.gpu, request, key, seconds)
            handle = await self.start_agent({"sandbox": sandbox.object_id}, request, key)
            with translated():
                silent = StreamType.DEVNULL
                await sandbox.exec.aio(*_guard(key), stdout=silent, stderr=silent)
                address = await self._tunnel(sandbox, handle)
                await detach(sandbox)
            return Handle(handle.provider, key, {**handle.data, "tunnel": address})
        except BaseException:
            with anyio.CancelScope(shield=True), anyio.move_on_after(_ROLL_BACK):
                await self._end(key)
            raise

    async def _tunnel(self, sandbox: Sandbox, handle: Handle) -> str:
        if not self._options.tunnel:
            return ""
        return await tunnel.opened(sandbox, handle.data["home"], handle.data["python"], handle.key)

    async def connect(self, handle: Handle) -> Wire:
        """Through the tunnel; where that does not lead to the agent, through a command."""
        address = handle.data.get("tunnel", "")
        if address and address not in _closed_tunnels:
            wire = await tunnel.connect(address)
            if wire is not None:
                return wire
        wire = await super().connect(handle)
        if address:
            _closed_tunnels.add(address)  # while the machine can be reached
        return wire

    async def _sandbox(self, gpu: Gpu | None, request: Request, key: str, seconds: int) -> Sandbox:
        """The sandbox of this key, which is made if there is none."""
        import modal
        from modal.exception import AlreadyExistsError

        options = self._options
        app = await self._app()
        volumes: dict[str | os.PathLike[str], modal.Volume | modal.CloudBucketMount] = {}
        if options.volume:
            volumes[_VOLUME] = modal.Volume.from_name(
                options.volume, create_if_missing=True, version=2
            )
        pins = await anyio.to_thread.run_sync(packages.pins)
        image = await _image(pins.split()).build.aio(app)
        creating = asyncio.ensure_future(
            modal.Sandbox.create.aio(
                *_guard(key),
                app=app,
                name=f"{_TAG}-{key}",
                tags={_TAG: key},
                image=image,
                gpu=None if gpu is None else f"{rates.sku(gpu.name)}:{gpu.count}",
                cpu=options.cpu,
                memory=self._memory() >> 20,
                region=options.region or None,
                secrets=[modal.Secret.from_name(name) for name in options.secrets],
                env=dict(environment(_VOLUME)) if options.volume else None,
                volumes=volumes,
                encrypted_ports=[tunnel.any_port()] if options.tunnel else [],
                timeout=seconds,
                idle_timeout=round(request.idle) + _IDLE_MARGIN,
            )
        )
        try:
            return await asyncio.shield(creating)
        except AlreadyExistsError:
            return await modal.Sandbox.from_name.aio(options.app, f"{_TAG}-{key}")
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True), anyio.move_on_after(_ROLL_BACK):
                await self._undone(creating, key)
            raise

    async def _undone(self, creating: asyncio.Future[Sandbox], key: str) -> None:
        """Terminate a sandbox that may not be made yet. Its call is not cancelled: the service
        could have got it, and make the sandbox when nobody looks any more."""
        ended = False
        while not ended:
            ended = creating.done()
            with contextlib.suppress(MlinfraError):
                await self._end(key)
            await asyncio.wait([creating], timeout=_SWEEP)
        creating.exception()  # it has been dealt with

    async def _app(self) -> App:
        import modal

        return await modal.App.lookup.aio(self._options.app, create_if_missing=True)

    async def status(self, handle: Handle) -> Status:
        """As Modal tells. The entrypoint sees to it that a sandbox ends with its agent."""
        import modal
        from modal.exception import NotFoundError

        try:
            with translated():
                sandbox = await modal.Sandbox.from_id.aio(handle.data["sandbox"])
                code = await sandbox.poll.aio()
        except MlinfraError as error:
            if isinstance(error.__cause__, NotFoundError):
                return Status(False, "Modal knows it no longer")
            return Status(True, f"it cannot be asked: {error.message}")
        if code is None:
            return Status(True)
        reason = _EXITS.get(code, f"it ended with status {code}")
        return await bills.ended(sandbox, reason)

    async def cost(self, handle: Handle, started: float, stopped: float) -> Bill | None:
        """By Modal's billing report, some hours after its end."""
        sandbox = handle.data.get("sandbox", "")
        return await bills.bill(_TAG, handle.key, sandbox, started, stopped)

    async def stop(self, handle: Handle) -> None:
        """Terminate the sandbox."""
        import modal
        from modal.exception import NotFoundError

        try:
            with translated():
                await _terminate(await modal.Sandbox.from_id.aio(handle.data["sandbox"]))
        except MlinfraError as error:
            if not isinstance(error.__cause__, NotFoundError):
                raise

    async def list(self) -> list[Handle]:
        """Every sandbox of ours in the app."""
        import modal

        with translated():
            app = await self._app()
            found = []
            async for sandbox in modal.Sandbox.list.aio(app_id=app.app_id):
                key = (await sandbox.get_tags.aio()).get(_TAG)
                if key:
                    found.append(Handle(self.name, key, {"sandbox": sandbox.object_id}))
            return found

    async def _end(self, key: str) -> None:
        """Terminate whatever has this key."""
        import modal

        with translated():
            app = await self._app()
            async for sandbox in modal.Sandbox.list.aio(app_id=app.app_id, tags={_TAG: key}):
                await _terminate(sandbox)


def _within(seconds: float, act: Callable[[], object]) -> None:
    """Do something that may hang; raises TimeoutError then, and leaves it to itself."""
    done: Future[object] = Future()

    def work() -> None:
        try:
            done.set_result(act())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    wait([done], seconds)
    if not done.done():
        raise TimeoutError(f"no answer within {seconds:g} s")
    done.result()


def _seconds_of(request: Request, price: Price | None = None) -> int:
    """Modal's limit for the sandbox. Raises :class:`RequestError` for more than it allows."""
    if request.time is not None and request.time > _LONGEST:
        raise RequestError(
            f"time={units.format_duration(request.time)} is more than a Modal sandbox may live.",
            hint="Ask for 24h at most.",
        )
    seconds = longest(request, price or Price.unknown())
    return _LONGEST if seconds is None else min(_LONGEST, round(seconds) + _MARGIN)


def _guard(key: str) -> list[str]:
    script = Path(__file__).parent.with_name("guard.sh").read_text()
    return ["sh", "-c", script, "guard", key, str(_PATIENCE)]


def _image(pins: Sequence[str]) -> Image:
    """Debian with this Python, and the SDK's own requirements in the image's Python and in uv's
    cache, where the bootstrap finds them. Modal builds it once for these versions."""
    import modal

    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return (
        modal.Image.debian_slim(python_version=python)
        .pip_install("uv")
        .run_commands(f"uv pip install --system {' '.join(pins)}")
    )


async def _terminate(sandbox: Sandbox) -> None:
    await sandbox.terminate.aio()
    await sandbox.wait.aio(raise_on_termination=False)
