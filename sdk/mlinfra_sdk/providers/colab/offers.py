"""What Colab offers, and what it costs: compute units, which are bought, turned into USD."""

from __future__ import annotations

import datetime

from mlinfra_sdk import units
from mlinfra_sdk.catalog import Gpu, Gpus, Rate, current_rates, rates_for
from mlinfra_sdk.catalog.prices import store_live
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.ledger import Price
from mlinfra_sdk.providers.colab.account import Usage

VENDOR = "colab"
ACCELERATORS = {
    "T4": "T4",
    "L4": "L4",
    "A100": "A100",
    "H100": "H100",
    "RTX-PRO-6000": "G4",
}
"""The catalog's names, and Colab's own."""
TPUS = {"v5e1": "V5E1", "v6e1": "V6E1"}
_FREE = ("T4", "")
"""What an account without compute units may get: T4 and CPU."""
UNIT_USD = 0.0999
"""A compute unit: 100 were sold for 9.99 USD
(https://techcrunch.com/2022/09/29/google-colaboratory-launches-a-pay-as-you-go-option-premium-gpu-access/);
units of a subscription cost what it costs."""
UNIT_SEEN = "2022-09-29"


def fits(wanted: Gpus) -> list[Gpu]:
    """What Colab has of it, the most wanted first. Raises :class:`RequestError` if nothing."""
    found = [
        Gpu(name) for wish in wanted.alternatives for name in ACCELERATORS if wish.met_by(Gpu(name))
    ]
    if not found:
        have = ", ".join(ACCELERATORS)
        raise RequestError(
            f"Colab has no gpu={wanted}.",
            hint=f"It has one of {have} (which it calls G4). Which A100 or H100 it is, it does "
            "not say before.",
        )
    return list(dict.fromkeys(found))


def price(gpu: Gpu | None, usage: Usage) -> Price:
    """An hour of it for this account."""
    name = gpu.name if gpu is not None else ""
    if not usage.balance:
        if name not in _FREE:
            return Price.unknown()
        source = "your Colab account has no compute units: free of charge"
        return Price(0, source, datetime.date.today().isoformat())
    if gpu is not None:
        for fit in rates_for(Gpus((gpu,)), VENDOR):
            return Price(fit.micro_per_hour, fit.rate.source, fit.rate.date)
    return Price.unknown()


def learn(gpu: Gpu | None, usage: Usage) -> None:
    """Keep what this account pays for a GPU, for the next offer, where it can be told: when only
    one runtime is assigned, what is used in an hour is used by it."""
    if gpu is None or usage.assignments != 1 or not usage.rate or not usage.balance:
        return
    ours = [rate for rate in current_rates() if rate.vendor == VENDOR and rate.trust == "live"]
    measured = Rate(
        vendor=VENDOR,
        gpu=gpu.name,
        usd_per_hour=round(usage.rate * UNIT_USD, 6),
        source=f"your Colab account, {usage.rate:g} units an hour at {UNIT_USD} USD",
        date=datetime.date.today().isoformat(),
    )
    store_live(VENDOR, [measured, *(rate for rate in ours if rate.gpu != gpu.name)])


def note(usage: Usage) -> str:
    """What to know of the account before a machine is started."""
    cost = units.format_usd(round(usage.rate * UNIT_USD * units.MICRO))
    using = f", using {usage.rate:.2f} an hour now (about {cost})" if usage.assignments else ""
    return f"Your Colab account has {usage.balance:.2f} compute units{using}."
