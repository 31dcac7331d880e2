"""Machines that are SkyPilot clusters of one node, reached by the name that it gives ``ssh``.

The cluster's only job lasts as long as the agent does (``guard.sh``), and its idle time counts jobs
alone, not our connections: so it turns itself off when the agent has ended.
"""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Mapping
from contextvars import copy_context
from pathlib import Path
from typing import Any, ClassVar

import anyio
import anyio.to_thread
import msgspec

from mlinfra_sdk import units
from mlinfra_sdk.errors import MlinfraError, ProviderError, RequestError
from mlinfra_sdk.ledger import Price
from mlinfra_sdk.providers.base import Capabilities, Handle, Offer, Problem, Status, longest
from mlinfra_sdk.providers.remote import ExecProvider, Remote
from mlinfra_sdk.providers.sky import engine as skypilot
from mlinfra_sdk.providers.sky.names import gpu_of, names_for
from mlinfra_sdk.providers.ssh import SshRemote
from mlinfra_sdk.providers.waiting import tell
from mlinfra_sdk.spec import Request

PREFIX = "mlinfra-"
"""Of the names of our clusters; the key follows."""
_START_SECONDS = 240.0
_MOST = 5
"""Offers for each of the GPUs that are wanted: others for when the first has no capacity."""
_AUTODOWN_MINUTES = 2
"""Idle minutes, counted from the end of the agent, after which a cluster turns itself off."""
_PATIENCE = 900
"""Seconds that a cluster waits for an agent; then whoever launched it has died."""
_MARGIN = 600
"""Seconds that the job's own limit is behind the agent's: for when that has failed."""
_LONGEST = 8 * 3600
"""Seconds that a job of a Slurm cluster may take if ``time=`` does not say less."""
_OF_THE_USER = frozenset({"slurm", "kubernetes", "ssh"})
"""Where SkyPilot has no list of instance types, and no price unless its settings give one."""
_ROLL_BACK = 300.0
_CHECK_SECONDS = 60.0
_GUARD = Path(__file__).parent.with_name("guard.sh")


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a target: ``infra`` as SkyPilot writes it (``aws``, ``gcp/us-central1``, ``slurm/hpc``;
    without it all that are enabled compete), ``clouds`` whose packages SkyPilot is to have besides,
    ``spot`` machines, ``on_demand`` to take others where no spot one is to be had, ``cpus`` and
    ``memory`` (GiB) as SkyPilot writes them (``8+``), ``disk`` in GB, ``image`` (SkyPilot's
    ``image_id``), and ``without_autodown`` to allow clouds where a machine does not turn itself
    off."""

    infra: str = ""
    clouds: tuple[str, ...] = ()
    spot: bool = False
    on_demand: bool = False
    cpus: str = ""
    memory: str = ""
    disk: int = 0
    image: str = ""
    without_autodown: bool = False


class _Candidate(msgspec.Struct, frozen=True):
    """What SkyPilot's optimizer proposes; see ``offers`` in ``helper.py``."""

    wish: int
    cloud: str
    region: str
    instance: str
    accelerator: str
    count: int
    spot: bool
    usd_per_hour: float
    date: str
    autodown: bool

    @property
    def infra(self) -> str:
        return f"{self.cloud.lower()}/{self.region}".rstrip("/")

    @property
    def place(self) -> str:
        """``AWS us-east-1 g5.xlarge, spot``."""
        words = [self.cloud, self.region]
        if self.cloud.lower() not in _OF_THE_USER:
            words.append(self.instance)
        return " ".join(filter(None, words)) + (", spot" if self.spot else "")


class SkyProvider(ExecProvider):
    """Clusters of SkyPilot."""

    name: ClassVar[str] = "sky"
    options: ClassVar[type[msgspec.Struct]] = Options
    argument: ClassVar[str] = "infra"
    grace: ClassVar[float] = 25.0

    def __init__(self, options: Options | None = None) -> None:
        self._options = options or Options()
        self.capabilities = Capabilities(
            hard_stop="worker" if self._options.without_autodown else "host"
        )

    def check(self) -> list[Problem]:
        """Whether SkyPilot is installed, and which clouds it may use."""
        if not skypilot.is_installed():
            return [
                Problem(
                    "SkyPilot is not installed.",
                    "The first use of on=sky installs it in an environment of its own (320 MB).",
                )
            ]
        try:
            clouds = skypilot.engine().begin("clouds").result(_CHECK_SECONDS)
        except (MlinfraError, TimeoutError) as error:
            return [Problem(f"SkyPilot cannot be used: {error}", "Try again.")]
        wanted = skypilot.cloud_of(self._options.infra)
        enabled = {skypilot.cloud_of(cloud) for cloud in clouds}
        if wanted in enabled if wanted else enabled:
            return []
        which = f"{wanted} is not enabled" if wanted else "No cloud is enabled"
        check = f"{skypilot.command()} check {wanted}".rstrip()
        return [Problem(f"{which} in SkyPilot.", f"Set it up as it tells you by: {check}")]

    def remote(self, data: Mapping[str, str]) -> Remote:
        """The cluster, by the alias that SkyPilot writes for it."""
        return SshRemote(data["cluster"])

    async def _have(self, op: str, **arguments: Any) -> Any:
        return await skypilot.engine().ask(op, **arguments)

    async def _prepare(self) -> None:
        clouds = [*self._options.clouds, self._options.infra]
        if not skypilot.is_installed():
            tell("installing SkyPilot, 320 MB")
        await anyio.to_thread.run_sync(skypilot.prepare, clouds, abandon_on_cancel=True)

    async def offers(self, request: Request) -> list[Offer]:
        """What SkyPilot's optimizer would take, of all clouds that are enabled or of the one that
        is named, and what it would take next."""
        wishes = [names_for(wish) for wish in request.gpu.alternatives] if request.gpu else [{}]
        if request.gpu and not any(wishes):
            raise RequestError(f"SkyPilot has no gpu={request.gpu}.")
        await self._prepare()
        candidates: list[_Candidate] = []
        why = ""
        options = self._options
        for spot in [True, False] if options.spot and options.on_demand else [options.spot]:
            found = await self._have(
                "offers",
                wishes=[wish for wish in wishes if wish or not request.gpu],
                resources=self._resources(spot),
                most=_MOST,
            )
            candidates += [msgspec.convert(one, _Candidate) for one in found["candidates"]]
            why = why or found["why"]
        chosen = [one for one in candidates if one.autodown or self._options.without_autodown]
        if not chosen:
            raise self._nothing(request, candidates, why)
        return [self._offer(one, request) for one in chosen]

    def _nothing(self, request: Request, candidates: list[_Candidate], why: str) -> RequestError:
        where = f"sky:{self._options.infra}" if self._options.infra else "sky"
        if candidates:
            clouds = ", ".join(sorted({one.cloud for one in candidates}))
            return RequestError(
                f"Machines of {clouds} do not turn themselves off: if this computer is lost, they"
                " go on and cost.",
                hint="Put without_autodown = true into the target if you want them all the same.",
            )
        return RequestError(
            f"on={where} has no gpu={request.gpu or 'none'}. SkyPilot says: {why}",
            hint=f"Which clouds it may use, and why, tells: {skypilot.command()} check",
        )

    def _offer(self, one: _Candidate, request: Request) -> Offer:
        micro = round(one.usd_per_hour * units.MICRO)
        today = time.strftime("%Y-%m-%d")
        if one.cloud.lower() in _OF_THE_USER:
            source = "SkyPilot's settings" if micro else "your own cluster"
            price = Price(micro or request.price, source, today)
        else:
            price = Price(micro, "SkyPilot's catalog", one.date or today)
        gpu = gpu_of(one.accelerator, one.count) if one.count else None
        return Offer(
            self.name,
            gpu,
            price,
            _START_SECONDS,
            place=one.place,
            data={
                "infra": one.infra,
                "instance": one.instance,
                "accelerator": one.accelerator,
                "autodown": "yes" if one.autodown else "",
                "spot": "yes" if one.spot else "",
            },
        )

    def _resources(self, spot: bool) -> dict[str, Any]:
        """What all requests of this target ask of SkyPilot."""
        options = self._options
        given = {
            "infra": options.infra,
            "use_spot": spot,
            "cpus": options.cpus,
            "memory": options.memory,
            "disk_size": options.disk,
            "image_id": options.image,
        }
        return {name: value for name, value in given.items() if value}

    def _task(self, offer: Offer, request: Request, key: str) -> dict[str, Any]:
        """A task of SkyPilot, as its YAML files say it."""
        resources = self._resources(bool(offer.data["spot"])) | {"infra": offer.data["infra"]}
        if offer.data["autodown"]:
            end = {"idle_minutes": _AUTODOWN_MINUTES, "down": True, "wait_for": "jobs"}
            resources["autostop"] = end
        if offer.data["accelerator"]:
            assert offer.gpu is not None
            resources["accelerators"] = {offer.data["accelerator"]: offer.gpu.count}
        cloud = skypilot.cloud_of(offer.data["infra"])
        if cloud not in _OF_THE_USER:
            resources["instance_type"] = offer.data["instance"]
        guard = ["sh", "-c", _GUARD.read_text(), "guard", key, str(_PATIENCE)]
        seconds = longest(request, offer.price)
        if seconds is not None:
            guard = ["timeout", str(math.ceil(seconds) + _MARGIN), *guard]
        task = {"name": "mlinfra", "resources": resources, "run": shlex.join(guard)}
        if cloud == "slurm":
            minutes = math.ceil(((seconds or _LONGEST) + _MARGIN) / 60)
            task["config"] = {"slurm": {"sbatch_options": {"time": str(minutes)}}}
        return task

    async def launch(
        self, offer: Offer, request: Request, key: str, previous: Handle | None = None
    ) -> Handle:
        """Have SkyPilot make a cluster, and start an agent in it; see :meth:`Provider.launch`."""
        await self._prepare()
        cluster = PREFIX + key
        launched = False
        try:
            task, said = self._task(offer, request, key), copy_context()
            await self._have(
                "launch", tell=lambda text: said.run(tell, text), cluster=cluster, task=task
            )
            launched = True
            tell("starting the worker")
            handle = await self.start_agent({"cluster": cluster}, request, key)
            await self._have("keep", cluster=cluster)
            return handle
        except BaseException as error:
            # What SkyPilot itself says has failed, its process has already taken down.
            if launched or not isinstance(error, ProviderError):
                with anyio.CancelScope(shield=True), anyio.move_on_after(_ROLL_BACK):
                    await self._have("down", cluster=cluster)
            raise

    async def status(self, handle: Handle) -> Status:
        """As the agent tells, if it can be reached; else as the cloud does. A cluster whose agent
        has ended is about to turn itself off."""
        told = Status(True)
        if handle.data.get("python"):  # else it is only being made
            told = await super().status(handle)
            if not told.alive or not told.reason:
                return told
        try:
            state = await self._have("status", cluster=handle.data["cluster"])
        except MlinfraError as error:
            return Status(True, f"it cannot be asked: {error.message}")
        if not state:
            return Status(False, "its cluster is gone: it was stopped, or taken back by the cloud")
        return told if state != "STOPPED" else Status(False, "its cluster was stopped")

    async def stop(self, handle: Handle) -> None:
        """Take the cluster down."""
        await self._prepare()
        await self._have("down", cluster=handle.data["cluster"])

    async def list(self) -> list[Handle]:
        """All clusters with names of ours that SkyPilot knows."""
        if not skypilot.is_installed() or not _has_state():
            return []
        names = await self._have("clusters", prefix=PREFIX)
        return [Handle(self.name, name.removeprefix(PREFIX), {"cluster": name}) for name in names]


def _has_state() -> bool:
    """Whether SkyPilot has ever had a cluster: to ask it takes seconds, and starts its server."""
    root = Path(os.environ.get("SKY_RUNTIME_DIR") or "~").expanduser()
    return (root / ".sky" / "state.db").exists()
