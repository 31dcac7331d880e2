"""The provider: an agent here for each machine, which pushes its runs."""

from __future__ import annotations

import os
import time
from typing import ClassVar

import msgspec
from anyio.from_thread import start_blocking_portal

from mlinfra_sdk import paths, units
from mlinfra_sdk.catalog import Gpu
from mlinfra_sdk.errors import MlinfraError, RequestError
from mlinfra_sdk.ledger import Price
from mlinfra_sdk.providers.base import Capabilities, Handle, Offer, Problem
from mlinfra_sdk.providers.here import AgentsHere
from mlinfra_sdk.providers.kaggle import service
from mlinfra_sdk.providers.kaggle.host import Settings
from mlinfra_sdk.spec import Request
from mlinfra_sdk.worker.folder import Config
from mlinfra_sdk.worker.watchdog import Limits

_START_SECONDS = 120.0
_LONGEST = 12 * 3600
_HOST = "mlinfra_sdk.providers.kaggle.host:KaggleHost"
_COUNTS = (1, 2)
"""Kaggle's machine has two T4."""


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a target: Kaggle ``datasets`` (``owner/name``) below ``/kaggle/input``, and whether runs
    may use the ``internet``, which an account without a verified phone may not."""

    datasets: tuple[str, ...] = ()
    internet: bool = True


class KaggleProvider(AgentsHere):
    """Machines that are agents here, each with a directory of its own (0700)."""

    name: ClassVar[str] = "kaggle"
    place: ClassVar[str] = "kaggle"
    capabilities = Capabilities(hard_stop="provider", channel="batch")
    options: ClassVar[type[msgspec.Struct]] = Options
    argument: ClassVar[str] = ""

    def __init__(self, options: Options | None = None) -> None:
        self._options = options or Options()
        self._quota: service.Quota | None = None

    def check(self) -> list[Problem]:
        """Whether Kaggle lets us in."""
        if not service.has_login():
            return [Problem("There is no login for Kaggle.", service.LOG_IN)]
        try:
            with start_blocking_portal() as portal:
                self._quota = portal.call(service.quota)
        except MlinfraError as error:
            return [Problem(error.message, error.hint)]
        return []

    def remaining(self) -> str:
        """The quota that the last :meth:`check` heard of."""
        return str(self._quota) if self._quota is not None else ""

    async def offers(self, request: Request) -> list[Offer]:
        """T4, one or both of the two that its machine has, or a CPU."""
        if request.data:
            raise RequestError(
                "data= does not reach Kaggle.",
                hint='Name Kaggle datasets: datasets = ["owner/name"] below [targets.kaggle].',
            )
        gpu = None
        if request.gpu is not None:
            fitting = [
                Gpu("T4", wish.count)
                for wish in request.gpu.alternatives
                if wish.count in _COUNTS and wish.met_by(Gpu("T4", wish.count))
            ]
            if not fitting:
                raise RequestError(
                    f"Kaggle has no gpu={request.gpu}.",
                    hint="It has T4, one or two. Its P100 is retired: who asks for it gets T4.",
                )
            gpu = fitting[0]
        quota = await service.quota()
        price = Price(0, "Kaggle: free of charge, by a weekly quota", time.strftime("%Y-%m-%d"))
        note = (
            f"At Kaggle {quota}. A cell runs there by itself: variables go along and come back, "
            "files do not."
        )
        return [Offer(self.name, gpu, price, _START_SECONDS, note)]

    async def launch(
        self, offer: Offer, request: Request, key: str, previous: Handle | None = None
    ) -> Handle:
        """Start an agent; see :meth:`Provider.launch`. Nothing is pushed before the first run."""
        if request.time is not None and request.time > _LONGEST:
            raise RequestError(
                f"time={units.format_duration(request.time)} is more than Kaggle lets a run take.",
                hint="Ask for 12h at most.",
            )
        settings = Settings(
            key=key,
            gpu="none" if offer.gpu is None else f"{offer.gpu.name}:{offer.gpu.count}",
            seconds=round(request.time or _LONGEST),
            datasets=self._options.datasets,
            internet=self._options.internet,
        )
        config = Config(
            secret=os.urandom(32),
            store=str(paths.data_dir() / "store"),
            # Its runs cost nothing, and it waits for the one that is under way.
            limits=Limits(idle=request.idle, time=request.time, lease=2 * _LONGEST),
            shared_fs=True,
            prestart=False,
            host=_HOST,
            host_options=msgspec.json.encode(settings).decode(),
        )
        return await self.start(self.machines() / key, config, previous)
