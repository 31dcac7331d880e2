"""``mlinfra catalog``: accelerators and what they cost, with the sources."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import msgspec

from mlinfra_sdk import units
from mlinfra_sdk.catalog import (
    Accelerator,
    Gpu,
    Gpus,
    Rate,
    catalog,
    current_rates,
    is_stale,
    rates_for,
)
from mlinfra_sdk.catalog.prices import Fit
from mlinfra_sdk.errors import RequestError, did_you_mean
from mlinfra_sdk.machines import market
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.spec import GPU
from mlinfra_sdk.terminal import console, print_json, say

_TRUST = {"live": "asked", "yours": "your config.toml", "bundled": "list price"}
FOOT = (
    "TFLOPS without sparsity and GB/s as the vendors state them. Prices in USD per hour, without "
    "tax; those older than 90 days are marked stale. `mlinfra catalog --json` names every source."
)


def dispatch(options: argparse.Namespace) -> int:
    """Carry the command out; gives the exit status."""
    if options.refresh:
        refresh([options.provider] if options.provider else [])
    parts, fits = chosen(options.gpu or "", options.provider or "")
    if options.json:
        print_json(
            {
                "accelerators": [msgspec.to_builtins(part) for part in parts],
                "rates": [_plain(fit) for fit in fits],
            }
        )
    else:
        show(parts, fits)
    return 0


def refresh(names: Sequence[str]) -> None:
    """Ask providers (default: all that are set up) for their rates, and say how that went."""
    counts, notes = portal().call(market.refresh_rates(names))
    for name, count in counts.items():
        say(f"{name} gave {count} rates.")
    for note in notes:
        say(note)
    if not counts and not notes:
        say("No provider that is set up tells its rates.")


def chosen(gpu: str, vendor: str) -> tuple[list[Accelerator], list[Fit]]:
    """The accelerators and rates that fit a value of ``gpu=`` and a vendor; empty texts: all."""
    rates = current_rates()
    vendors = sorted({rate.vendor for rate in rates})
    if vendor and vendor not in vendors:
        raise RequestError(
            f"No prices of {vendor!r} are known.{did_you_mean(vendor, vendors)}",
            hint=f"Known: {', '.join(vendors)}. `mlinfra catalog --refresh` asks yours.",
        )
    parts = list(catalog().parts.values())
    if not gpu:
        fits = [Fit(Gpu(it.gpu, it.count), it.for_count(it.count) or 0, it) for it in rates]
        fits = [fit for fit in fits if vendor in ("", fit.rate.vendor)]
        return parts, sorted(fits, key=lambda fit: (fit.gpu.name, fit.micro_per_hour))
    wanted = _wanted(gpu)
    return (
        [part for part in parts if _fits(part, wanted)],
        rates_for(wanted, vendor or None),
    )


def _wanted(text: str) -> Gpus:
    try:
        wanted = GPU.parse(text)
    except ValueError as proposal:
        raise RequestError(
            f"The GPU {text!r} is not understood.{proposal}", hint=f"Accepted: {GPU.accepts}."
        ) from None
    if not isinstance(wanted, Gpus):
        raise RequestError("There is no GPU in 'none'.", hint=f"Accepted: {GPU.accepts}.")
    return wanted


def _fits(part: Accelerator, wanted: Gpus) -> bool:
    return any(
        Gpu(wish.name, 1, wish.memory).met_by(Gpu(part.name)) for wish in wanted.alternatives
    )


def show(parts: Sequence[Accelerator], fits: Sequence[Fit]) -> None:
    """Both tables, on standard output."""
    from rich.table import Table

    out = console()
    table = Table(box=None, pad_edge=False)
    table.add_column("GPU")
    for name in ("memory", "GB/s", "fp32", "tf32", "bf16", "fp16"):
        table.add_column(name, justify="right")
    for part in sorted(parts, key=lambda part: (part.memory_gb, part.name)):
        rates = part.tflops
        figures = (rates.fp32, rates.tf32, rates.bf16, rates.fp16)
        shown = ("-" if it is None else f"{it:g}" for it in figures)
        table.add_row(part.name, f"{part.memory_gb} GB", str(part.bandwidth_gb_s), *shown)
    out.print(table)
    out.print()
    if not fits:
        out.print("price unknown")
        return
    table = Table("GPU", "at", "as", box=None, pad_edge=False)
    table.add_column("USD/h", justify="right")
    for name in ("includes", "of", "by"):
        table.add_column(name)
    for fit in fits:
        rate = fit.rate
        table.add_row(
            str(fit.gpu),
            rate.vendor,
            " ".join(filter(None, (rate.sku, rate.region, "spot" if rate.spot else ""))),
            f"{fit.micro_per_hour / units.MICRO:.2f}",
            rate.includes,
            f"{rate.date} stale" if is_stale(rate.date) else rate.date,
            _TRUST[rate.trust],
        )
    out.print(table)
    out.print()
    out.print(FOOT)


def _plain(fit: Fit) -> dict[str, Any]:
    rate: Rate = fit.rate
    facts: dict[str, Any] = msgspec.to_builtins(rate)
    return facts | {
        "gpu": fit.gpu.name,
        "count": fit.gpu.count,
        "usd_per_hour": fit.micro_per_hour / units.MICRO,
        "stale": is_stale(rate.date),
    }
