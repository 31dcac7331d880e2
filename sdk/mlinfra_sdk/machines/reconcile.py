"""Asking providers what they have billed for machines that have ended; each is recorded once."""

from __future__ import annotations

import time

import anyio

from mlinfra_sdk import providers
from mlinfra_sdk.errors import MlinfraError
from mlinfra_sdk.ledger import Ledger, Machine
from mlinfra_sdk.machines.market import PATIENCE
from mlinfra_sdk.providers.base import Bill, Handle, TellsCost

_AGAIN_AFTER = 3600.0
"""Seconds between two questions about one machine."""
_GIVE_UP = 30 * 86400.0
"""Seconds after its end at which a machine is taken for one that is not billed by itself."""


async def reconcile(
    ledger: Ledger, again_after: float = _AGAIN_AFTER
) -> list[tuple[Machine, Bill]]:
    """Record what providers have billed for machines that have no bill yet; gives the new ones. A
    provider that fails is asked again later."""
    found = []
    told = {charge.machine_id for charge in ledger.charges() if charge.amount is not None}
    for machine in ledger.machines(active=False):
        if machine.id in told or abs(time.time() - (machine.stopped_at or 0)) > _GIVE_UP:
            continue
        try:
            handle = handle_of(machine)
            provider = providers.of(handle)
        except MlinfraError:
            continue  # its provider is not installed any more
        if not isinstance(provider, TellsCost) or not ledger.ask_charge(
            machine.id, again_after=again_after
        ):
            continue
        started = machine.intended_at if machine.started_at is None else machine.started_at
        try:
            with anyio.fail_after(PATIENCE):
                bill = await provider.cost(handle, started, machine.stopped_at or started)
        except (MlinfraError, TimeoutError):
            continue
        if bill is not None and ledger.charged(machine.id, bill.amount, source=bill.source):
            found.append((machine, bill))
    return found


def handle_of(machine: Machine) -> Handle:
    """Where a machine was; its data is empty if its launch was never confirmed."""
    if machine.handle:
        return Handle.from_json(machine.handle)
    return Handle(providers.load(machine.provider).name, machine.id, {})
