"""``mlinfra quote``: what a machine would cost, at everybody who has it."""

from __future__ import annotations

import argparse
import re
from typing import Any

from mlinfra_sdk import units
from mlinfra_sdk.catalog import is_stale
from mlinfra_sdk.machines import market
from mlinfra_sdk.machines.market import TEN_MINUTES, Market, Quote
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.spec import Request
from mlinfra_sdk.terminal import console, print_json

UNKNOWN = "unknown"


def dispatch(options: argparse.Namespace, request: Request) -> int:
    """Carry the command out; gives the exit status."""
    found = ask(request)
    if options.json:
        print_json(
            {
                "quotes": [_plain(quote) for quote in found.quotes],
                "notes": found.notes,
                "missing": found.missing,
            }
        )
    else:
        show(found)
    return 0


def ask(request: Request) -> Market:
    """Everything that is to be had for a request. Raises :class:`RequestError`."""
    return portal().call(market.offers(request))


def show(found: Market) -> None:
    """A table of the quotes, the one that would be taken first, and who has none."""
    from rich.console import Group
    from rich.table import Table

    out = console()
    table = Table(box=None, pad_edge=False)
    for name in ("GPU", "on", "USD/h", "10 minutes", "starts in", "price from", "of"):
        table.add_column(name, justify="right" if name in ("USD/h", "10 minutes") else "left")
    for quote in found.quotes:
        table.add_row(*_row(quote))
    told = [f"{quote.target}: {quote.offer.note}" for quote in found.quotes if quote.offer.note]
    lines = [*dict.fromkeys(told), *found.notes]
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
