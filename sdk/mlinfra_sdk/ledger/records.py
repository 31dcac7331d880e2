"""What the ledger holds, as values. Times are Unix seconds, money is micro-USD."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from mlinfra_sdk import units
from mlinfra_sdk.catalog import is_stale

_UNKNOWN = "unknown"


class Price(msgspec.Struct, frozen=True):
    """A rate, and why it is believed: where it was read and on which day (ISO date).

    ``granularity_s`` and ``minimum_s`` are the steps in which the provider bills, and the least
    that it bills, in seconds; 0 where that is not known.
    """

    micro_per_hour: int
    source: str
    date: str
    granularity_s: float = 0.0
    minimum_s: float = 0.0

    @classmethod
    def unknown(cls) -> Price:
        """What nobody states; it counts as nothing and is never shown as an amount."""
        return cls(0, _UNKNOWN, "")

    @property
    def known(self) -> bool:
        """Whether the rate is an amount."""
        return self.source != _UNKNOWN

    def describe(self) -> str:
        """``$1.10/h (modal.com, 2026-07-01)``, with ``stale`` if it is old."""
        if not self.known:
            return "price unknown"
        source = re.sub(r"^https?://([^/]+).*", r"\1", self.source).removeprefix("www.")
        age = ", stale" if is_stale(self.date) else ""
        return f"{units.format_usd(self.micro_per_hour)}/h ({source}, {self.date}{age})"


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One machine, from the intent to launch it to its end."""

    id: str
    name: str
    provider: str
    gpu: str
    gpu_count: int
    handle: str
    price: Price
    intended_at: float
    started_at: float | None
    stopped_at: float | None
    stop_reason: str


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of work on a machine. ``seconds`` is None while it is open."""

    id: int
    machine_id: str
    kind: str
    notebook: str
    cell: str
    opened_at: float
    seconds: float | None
    status: str
    bytes_up: int
    bytes_down: int


class Charge(msgspec.Struct, frozen=True, kw_only=True):
    """What a provider has billed for a machine; ``amount`` is None while it has not said."""

    machine_id: str
    kind: str
    asked_at: float
    recorded_at: float | None
    amount: int | None
    source: str


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """Data that moved to or from a machine beside any run. ``seconds`` is None while it moves."""

    id: int
    machine_id: str
    direction: Literal["up", "down"]
    what: str
    opened_at: float
    seconds: float | None
    bytes: int


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """A figure about a run. ``kind`` says whether it was measured here, read somewhere or is an
    estimate, ``source`` how or where; ``at`` is when (default: when it is recorded)."""

    name: str
    value: float
    unit: str = ""
    kind: Literal["measured", "sourced", "estimated"] = "measured"
    source: str = ""
    at: float | None = None
    run_id: int = 0
