"""What a provider does: a few things and no more; everything above is common."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import msgspec

from mlinfra_sdk.ledger import Price
from mlinfra_sdk.link.wire import Wire
from mlinfra_sdk.spec import Gpu, Request
from mlinfra_sdk.worker.host import Status
from mlinfra_sdk.worker.watchdog import Limits

__all__ = [
    "Bill",
    "Capabilities",
    "Handle",
    "NoOptions",
    "Offer",
    "OpensShell",
    "Problem",
    "Provider",
    "Status",
    "TellsCost",
    "limits_of",
    "longest",
]


class Capabilities(msgspec.Struct, frozen=True):
    """What a backend can do. ``hard_stop`` says who ends a machine that everybody forgot:
    ``provider``, ``host``, ``worker`` (the agent's own watchdog) or ``none``. ``channel`` says how
    runs are reached: ``live``, or ``batch`` where a run is pushed with its variables to a machine
    of its own, and comes back as a whole: neither files nor packages go along."""

    hard_stop: str
    shared_fs: bool = False
    rented: bool = True
    """Whether a machine costs what it costs because it was launched: one of the user's own, which
    runs anyway, is started without a question."""
    channel: Literal["live", "batch"] = "live"

    @property
    def hard_stop_in_words(self) -> str:
        """What happens to a machine whose agent does not end it."""
        return _HARD_STOPS[self.hard_stop]


_HARD_STOPS = {
    "provider": "its provider ends it in any case",
    "host": "it turns itself off in any case",
    "worker": "only the worker ends: the host stays on",
    "none": "nothing ends it but you",
}


class Problem(msgspec.Struct, frozen=True):
    """Something that keeps a provider from working, and how to mend it."""

    what: str
    mend: str


class Offer(msgspec.Struct, frozen=True):
    """A machine that could be had: what it is, what it costs, and how long its start takes.
    ``place`` says where, if the provider has several; ``data`` is what it needs to launch it;
    ``note`` is what a user should read before it is started."""

    provider: str
    gpu: Gpu | None
    price: Price
    start_seconds: float
    note: str = ""
    place: str = ""
    data: dict[str, str] = {}


class Handle(msgspec.Struct, frozen=True):
    """Enough to find a machine again from another process; no secrets. ``data`` is the
    provider's own."""

    provider: str
    key: str
    data: dict[str, str]

    def to_json(self) -> str:
        """For the ledger."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Handle:
        """The inverse of :meth:`to_json`."""
        return msgspec.json.decode(text, type=cls)


class Bill(msgspec.Struct, frozen=True):
    """What a provider has billed for a machine, in micro-USD, and what says so."""

    amount: int
    source: str


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a provider that has nothing to set."""


def limits_of(request: Request) -> Limits:
    """The agent's own limits for a machine that is launched by this request."""
    return Limits(idle=request.idle, time=request.time, paid=request.paid, budget=request.paid_by)


def longest(request: Request, price: Price) -> float | None:
    """Seconds that a machine may live at most, for the provider's own deadline behind the agent's
    limits: by ``time=``, or by what ``machine_budget=`` pays for. None: nothing was said."""
    known = [] if request.time is None else [request.time]
    if request.machine_budget is not None and price.micro_per_hour:
        known.append(request.machine_budget / price.micro_per_hour * 3600)
    return min(known, default=None)


class Provider(Protocol):
    """A backend. All methods but the first are coroutines that clean up when cancelled.

    It is made with the options of its target (a ``[targets.NAME]`` table, or what stands behind the
    colon of ``on=ssh:box``); for a machine that exists it is made without, and takes all that it
    has to know from the handle.
    """

    name: ClassVar[str]
    """The name of its entry point."""
    capabilities: Capabilities
    options: ClassVar[type[msgspec.Struct]]
    """Its options with their types and defaults, unknown ones forbidden."""
    argument: ClassVar[str]
    """The option that stands behind the colon; empty if there is none."""

    def __init__(self, options: Any = ...) -> None: ...

    def check(self) -> list[Problem]:
        """What is missing for this provider to work. Costs nothing."""
        ...

    async def offers(self, request: Request) -> list[Offer]:
        """What fits the request, cheapest first. Raises :class:`RequestError` if nothing can."""
        ...

    async def launch(
        self, offer: Offer, request: Request, key: str, previous: Handle | None = None
    ) -> Handle:
        """Start a machine with a running agent, whose own limits are set. ``key`` is its id: a
        second launch with the same key gives the same machine. A failed or cancelled launch
        leaves nothing running. It takes over what the machine ``previous`` has left."""
        ...

    async def connect(self, handle: Handle) -> Wire:
        """A new wire to the agent."""
        ...

    async def secret(self, handle: Handle) -> bytes:
        """The session secret that the agent was started with."""
        ...

    async def status(self, handle: Handle) -> Status:
        """How the machine is, asked of whoever really knows. One that cannot be asked counts as
        alive: it may well run, and cost."""
        ...

    async def stop(self, handle: Handle) -> None:
        """End the machine; returns when it is gone. Stopping twice is no error."""
        ...

    async def remains(self) -> list[Handle]:
        """Machines that have ended and left runs to be collected, where that is possible."""
        ...

    async def list(self) -> list[Handle]:
        """Every living machine of ours, also those that the ledger does not know."""
        ...


@runtime_checkable
class OpensShell(Protocol):
    """A provider whose machines can be entered by a command of their own kind."""

    def shell(self, handle: Handle) -> list[str]:
        """The command that runs a shell on the machine in this terminal. Raises
        :class:`ProviderError` if there is none."""
        ...


@runtime_checkable
class TellsCost(Protocol):
    """A provider that also tells what it has billed."""

    async def cost(self, handle: Handle, started: float, stopped: float) -> Bill | None:
        """What it has billed in all for a machine that has ended, which lived from ``started`` to
        ``stopped`` (Unix time, by this computer's clock, which may be wrong). None while that is
        not known for good: it is asked again later. ``handle.data`` is empty for a machine whose
        launch was never confirmed."""
        ...
