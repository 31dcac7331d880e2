"""What a sandbox costs: the GPU's rate, and what Modal bills on top for cores and memory."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping
from decimal import Decimal

import anyio

from mlinfra_sdk import units
from mlinfra_sdk.catalog import Gpus, Rate, catalog, current_rates, rates_for
from mlinfra_sdk.catalog.prices import Fit, store_live
from mlinfra_sdk.errors import MlinfraError, RequestError
from mlinfra_sdk.ledger import Price
from mlinfra_sdk.providers.modal.errors import translated

VENDOR = "modal"
SOURCE = "https://modal.com/pricing (sandboxes)"
SEEN = "2026-10-08"
_CORE = 0.00003942 * 3600
_GIB = 0.00000667 * 3600
"""USD an hour for a core and for a GiB that a sandbox has asked for; read on that page by others
on that day. What it uses beyond is billed, too: an estimate from this is the least."""
_STEP = 1.0
"""Seconds in which Modal bills; its prices are for one."""
_ASK_SECONDS = 10.0
_PLAUSIBLE = 3.0


def machine_price(cores: float, memory: int, fit: Fit | None) -> Price:
    """An hour of a sandbox with so many cores and bytes, and with this GPU."""
    micro = round((cores * _CORE + memory / (1 << 30) * _GIB) * units.MICRO)
    if fit is None:
        return Price(micro, SOURCE, SEEN, _STEP)
    step = _STEP if fit.rate.granularity_s is None else fit.rate.granularity_s
    seen = min(SEEN, fit.rate.date)
    return Price(micro + fit.micro_per_hour, fit.rate.source, seen, step)


def fits(wanted: Gpus) -> list[Fit]:
    """What Modal has of it, the most wanted first. Raises :class:`RequestError` if nothing."""
    found = rates_for(wanted, VENDOR)
    if not found:
        have = ", ".join(dict.fromkeys(rate.gpu for rate in _rates()))
        raise RequestError(f"Modal has no gpu={wanted}.", hint=f"It has {have}.")
    return found


def sku(gpu: str) -> str:
    """Modal's own name for a GPU of the catalog."""
    return next((rate.sku for rate in _rates() if rate.gpu == gpu and rate.sku), gpu)


def _rates() -> list[Rate]:
    return [rate for rate in current_rates() if rate.vendor == VENDOR]


async def ask() -> list[Rate]:
    """The account's own rates. Raises :class:`mlinfra_sdk.errors.MlinfraError` if it may not see
    them, which not every plan may."""
    import modal

    with translated():
        answer = await modal.Workspace.from_context().billing.rates.aio()
    return _read(answer)


async def refresh() -> None:
    """Keep the account's own rates, if it tells them soon; else those of the catalog hold."""
    with contextlib.suppress(MlinfraError), anyio.move_on_after(_ASK_SECONDS):
        store_live(VENDOR, await ask())


def _read(answer: Mapping[str, Decimal]) -> list[Rate]:
    """The rates of GPUs that the catalog knows. Neither the names nor the unit are documented:
    what is no plausible price per second or hour, compared with the catalog, is left out."""
    known = {rate.gpu: rate for rate in _rates()}
    today = datetime.date.today().isoformat()
    read = []
    for name in answer:
        rate = known.get(catalog().canonical(name) or "")
        if rate is None:
            continue
        for hourly in (float(answer[name]) * 3600, float(answer[name])):
            if rate.usd_per_hour / _PLAUSIBLE < hourly < rate.usd_per_hour * _PLAUSIBLE:
                source = "your Modal account"
                read.append(
                    Rate(
                        vendor=VENDOR, gpu=rate.gpu, usd_per_hour=hourly, source=source, date=today
                    )
                )
    return read
