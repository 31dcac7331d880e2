"""``mlinfra sweep``: what runs and should not, and what providers have billed."""

from __future__ import annotations

import argparse

import msgspec

from mlinfra_sdk import units
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.machines.reconcile import reconcile
from mlinfra_sdk.machines.sweep import sweep
from mlinfra_sdk.terminal import console, print_json


def dispatch(options: argparse.Namespace) -> int:
    """Carry the command out; exits with 1 if something runs that should have been stopped."""
    ledger = Ledger.open()
    try:
        found = portal().call(sweep(ledger, stop=not options.dry_run, everywhere=options.all))
        bills = [] if options.dry_run else portal().call(reconcile(ledger))
    finally:
        ledger.close()
    if options.json:
        told = [{"machine": it.id, "usd": bill.amount / units.MICRO} for it, bill in bills]
        print_json({**msgspec.to_builtins(found), "bills": told})
    else:
        out = console()
        for line in (*map(str, found.findings), *found.notes):
            out.print(line)
        for machine, bill in bills:
            amount = units.format_usd(bill.amount)
            out.print(f"{machine.name} on {machine.provider} was billed {amount} ({bill.source}).")
        if not found.findings:
            out.print("Nothing runs that nobody wants.")
    left = any(it.what == "forgotten" and not it.stopped for it in found.findings)
    return int(left and not options.dry_run)
