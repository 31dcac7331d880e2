"""After a cell that took long here: what it may take, and cost, on a GPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from mlinfra_sdk import predict, units
from mlinfra_sdk.catalog import parse_gpus, rates_for
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.predict import Past, Place, Prediction

_GPUS = ("T4", "L4", "A10", "A100", "H100")
"""What is compared: from cheap to fast."""
_USE_GPUS = frozenset({"torch", "tensorflow", "jax", "cupy", "keras"})
"""Without one of these in the kernel nothing says that a GPU would be used."""


@dataclass(frozen=True)
class _Choice:
    gpu: str
    micro_per_hour: int
    source: str
    known: Prediction

    @property
    def cost(self) -> int:
        return units.cost(self.micro_per_hour, self.known.seconds)

    def describe(self) -> str:
        """``T4: about 20s (5s to 1m20s), $0.0033 at $0.59/h (modal, 2026-11-25)``."""
        money = units.format_usd(self.cost)
        return f"{self.gpu}: {self.known.in_words()}, {money} at {self.source}"


def after(cell: Past, notebook: str, local: list[Past]) -> str:
    """What to say below a cell that has run here; empty: nothing, for nothing is known."""
    if not _USE_GPUS & sys.modules.keys():
        return ""
    choices = _choices(cell, notebook, local)
    if not choices:
        return ""
    cheapest = min(choices, key=lambda it: it.cost)
    fastest = min(choices, key=lambda it: it.known.seconds)
    shown = [cheapest] if cheapest == fastest else [cheapest, fastest]
    took = units.format_duration(cell.seconds)
    lines = [f"This cell took {took} here. An estimate of what it takes on a GPU, if it uses one:"]
    lines += [f"  {it.describe()}" for it in shown]
    lines.append(
        f"In brackets: 8 of 10 runs. The start of a machine comes on top. `%%remote "
        f"gpu={cheapest.gpu}` as the first line runs it there; `%remote use hint=no` ends this."
    )
    return "\n".join(lines)


def _choices(cell: Past, notebook: str, local: list[Past]) -> list[_Choice]:
    offers = []
    for name in _GPUS:
        wanted = parse_gpus(name)
        assert wanted is not None
        fits = [
            it for it in rates_for(wanted) if not it.rate.spot and it.rate.includes == "machine"
        ]
        if fits:
            best = min(fits, key=lambda it: it.micro_per_hour)
            offers.append((name, best))
    if not offers:
        return []
    ledger = Ledger.open()
    try:
        places = [Place("", fit.gpu.name, fit.gpu.count) for _, fit in offers]
        here = predict.calibrate()
        known = predict.estimate(ledger, notebook, cell.cell, places, here=here, local=local)
    finally:
        ledger.close()
    return [
        _Choice(
            name,
            fit.micro_per_hour,
            f"{units.format_usd(fit.micro_per_hour)}/h ({fit.rate.vendor}, {fit.rate.date})",
            it,
        )
        for (name, fit), it in zip(offers, known, strict=True)
        if it is not None
    ]
