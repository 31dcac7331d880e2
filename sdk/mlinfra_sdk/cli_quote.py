"""``mlinfra quote``: what a machine would cost, at everybody who has it, and what a cell would
take there."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from mlinfra_sdk import predict, units
from mlinfra_sdk.catalog import is_stale
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines import market
from mlinfra_sdk.machines.market import TEN_MINUTES, Market, Quote
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.predict import Past, Prediction
from mlinfra_sdk.spec import Request
from mlinfra_sdk.terminal import console, print_json

UNKNOWN = "unknown"


def dispatch(options: argparse.Namespace, request: Request) -> int:
    """Carry the command out; gives the exit status."""
    found = ask(request)
    known = _of_run(found, options.run) if options.run is not None else []
    if options.json:
        print_json(
            {
                "quotes": [
                    _plain(quote) | _predicted(quote, known[number] if known else None)
                    for number, quote in enumerate(found.quotes)
                ],
                "notes": found.notes,
                "missing": found.missing,
            }
        )
    else:
        show(found, known)
    return 0


def ask(request: Request) -> Market:
    """Everything that is to be had for a request. Raises :class:`RequestError`."""
    return portal().call(market.offers(request))


def predictions(
    found: Market, notebook: str, cell: str, local: Sequence[Past] = ()
) -> list[Prediction | None]:
    """What a cell (a ``cell_key``) of a notebook would take at each quote; ``local`` are runs of
    cells in the notebook's own kernel."""
    ledger = Ledger.open()
    try:
        places = [quote.kind for quote in found.quotes]
        here = predict.calibrate()
        return predict.estimate(ledger, notebook, cell, places, here=here, local=local)
    finally:
        ledger.close()


def _of_run(found: Market, number: int) -> list[Prediction | None]:
    ledger = Ledger.open()
    try:
        run = ledger.run(number)
    finally:
        ledger.close()
    if run is None or not run.cell:
        raise RequestError(
            f"There is no run {number} of a cell.", hint="`mlinfra cost --by run` shows them."
        )
    return predictions(found, run.notebook, run.cell)


def show(found: Market, known: Sequence[Prediction | None] = (), cell: str = "") -> None:
    """A table of the quotes, the one that would be taken first, and who has none. ``known`` are
    predictions for them, of the ``cell`` that is called so."""
    from rich.console import Group
    from rich.table import Table

    out = console()
    table = Table(box=None, pad_edge=False)
    for name in ("GPU", "on", "USD/h", "10 minutes", "starts in", "price from", "of"):
        table.add_column(name, justify="right" if name in ("USD/h", "10 minutes") else "left")
    predicted = any(known)
    if predicted:
        table.add_column("the cell, estimated")
        table.add_column("its cost")
    for number, quote in enumerate(found.quotes):
        table.add_row(*_row(quote), *(_estimated(quote, known[number]) if predicted else ()))
    told = [f"{quote.target}: {quote.offer.note}" for quote in found.quotes if quote.offer.note]
    lines = [*dict.fromkeys(told), *found.notes]
    if predicted:
        lines += _explained(found, known, cell)
    if found.missing:
        names = ", ".join(sorted({text.partition(": ")[0] for text in found.missing}))
        lines.append(f"Not set up: {names}. `mlinfra doctor` says how.")
    out.print(Group(table, *lines))  # one output in a notebook


def _row(quote: Quote) -> tuple[str, ...]:
    offer, price = quote.offer, quote.offer.price
    source = re.sub(r"^https?://([^/]+).*", r"\1", price.source).removeprefix("www.")
    stale = " (stale)" if price.known and is_stale(price.date) else ""
    return (
        str(offer.gpu) if offer.gpu is not None else "none",
        quote.target,
        f"{price.micro_per_hour / units.MICRO:.2f}" if price.known else UNKNOWN,
        units.format_usd(units.cost(price.micro_per_hour, TEN_MINUTES)) if price.known else UNKNOWN,
        f"about {units.format_duration(round(offer.start_seconds))}",
        source if price.known else "-",
        f"{price.date}{stale}" if price.known else "-",
    )


def _estimated(quote: Quote, known: Prediction | None) -> tuple[str, str]:
    price = quote.offer.price
    if known is None:
        return "not known", ""
    return known.in_words(), known.money(price.micro_per_hour) if price.known else UNKNOWN


def _explained(found: Market, known: Sequence[Prediction | None], cell: str) -> list[str]:
    """What the estimates are of, and from."""
    what = f"the cell `{cell}`" if cell else "the cell"
    said = [f"Estimates of {what} without the start, in brackets for 8 of 10 runs:"]
    for quote, it in zip(found.quotes, known, strict=True):
        if it is not None:
            said.append(f"  {quote.target}: from {it.basis}")
    return list(dict.fromkeys(said))


def _predicted(quote: Quote, known: Prediction | None) -> dict[str, Any]:
    if known is None:
        return {"estimate": None}
    price = quote.offer.price
    rate = price.micro_per_hour / units.MICRO / 3600 if price.known else None
    figures = {"seconds": known.seconds, "low": known.low, "high": known.high}
    usd = {f"usd_{name}": None if rate is None else rate * it for name, it in figures.items()}
    return {"estimate": {**figures, **usd, "basis": known.basis}}


def _plain(quote: Quote) -> dict[str, Any]:
    offer, price = quote.offer, quote.offer.price
    return {
        "gpu": str(offer.gpu) if offer.gpu is not None else None,
        "on": quote.target,
        "usd_per_hour": price.micro_per_hour / units.MICRO if price.known else None,
        "usd_in_10_minutes": (
            units.cost(price.micro_per_hour, TEN_MINUTES) / units.MICRO if price.known else None
        ),
        "start_seconds": offer.start_seconds,
        "note": offer.note,
        "price_source": price.source if price.known else None,
        "price_date": price.date if price.known else None,
        "stale": is_stale(price.date) if price.known else None,
        "hard_stop": quote.provider.capabilities.hard_stop,
    }
