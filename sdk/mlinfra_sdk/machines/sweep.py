"""Nothing left running: what providers have of ours is compared with what the ledger wants.

A machine is ours by its id, which begins with the ledger's mark. One that carries another mark
belongs to another computer of the user's, or of somebody who shares the account, which may want
it: it is only shown.
"""

from __future__ import annotations

import time
from typing import Literal

import anyio
import msgspec

from mlinfra_sdk import providers, targets
from mlinfra_sdk.errors import MlinfraError
from mlinfra_sdk.ledger import Ledger, Machine, Price
from mlinfra_sdk.machines import market
from mlinfra_sdk.machines.lifecycle import abandoned, close_ended
from mlinfra_sdk.machines.market import Market
from mlinfra_sdk.providers.base import Handle, Provider

_RECENT = 7 * 86400.0
"""Seconds for which a target that was used is asked, even if no settings file names it now."""
_STOPPING = 120.0
_FORGOTTEN = "nobody wanted it any more"


class Finding(msgspec.Struct, frozen=True):
    """A machine that was not as it should be. ``what`` is ``forgotten`` (it ran, and nobody wants
    it), ``elsewhere`` (it runs, and another computer of the user's may want it) or ``gone`` (it
    was believed to run). ``stopped``: it runs no longer."""

    what: Literal["forgotten", "elsewhere", "gone"]
    target: str
    key: str
    name: str
    stopped: bool
    detail: str = ""

    def __str__(self) -> str:
        name = self.name or self.key
        match self.what:
            case "gone":
                return f"{name} on {self.target} had ended: {self.detail}."
            case "elsewhere" if not self.stopped:
                return f"{name} on {self.target} runs for another computer that uses this account."
            case _ if self.stopped:
                return f"{name} on {self.target} ran on although {self.detail}; it is stopped."
        return f"{name} on {self.target} runs although {self.detail}."


class Sweep(msgspec.Struct, frozen=True):
    """What was found, and a sentence about each provider that could not be asked."""

    findings: list[Finding] = []
    notes: list[str] = []


async def sweep(ledger: Ledger, *, stop: bool = True, everywhere: bool = False) -> Sweep:
    """Close in the ledger what is gone, and stop what nobody wants; without ``stop`` it is only
    found. With ``everywhere``, machines of other computers count as not wanted, too."""
    findings: list[Finding] = []
    for known in ledger.machines(active=True):
        if known.handle:
            findings += await _gone(ledger, known, stop=stop)
    asked = Market()
    listed: set[str] = set()

    async def ask(target: str, provider: Provider) -> None:
        handles = await provider.list()
        listed.add(target)
        # The ledger is read behind the list: a launch writes there before the provider has it.
        known = {machine.id: machine for machine in ledger.machines()}
        for handle in handles:
            if (handle.provider, handle.key) not in seen:  # two targets may be one place
                seen.add((handle.provider, handle.key))
                found = _judged(ledger, target, handle, known.get(handle.key))
                if found is not None and (await provider.status(handle)).alive:
                    findings.append(await _dealt_with(ledger, found, handle, stop, everywhere))

    seen: set[tuple[str, str]] = set()
    used = _used(ledger)
    await market.ask_all(dict.fromkeys([*targets.names(), *used]), ask, asked, used)
    for known in ledger.machines(active=True):
        if not known.handle and known.provider in listed and abandoned(known):
            found = Finding("gone", known.provider, known.id, known.name, True, "it never started")
            if stop:
                ledger.machine_stopped(known.id, reason=found.detail)
            findings.append(found)
    return Sweep(findings, sorted(asked.notes))


async def _gone(ledger: Ledger, known: Machine, *, stop: bool) -> list[Finding]:
    """Whether a machine that is believed to run does not."""
    try:
        handle = Handle.from_json(known.handle)
        provider = providers.of(handle)
        with anyio.fail_after(market.PATIENCE):
            status = await provider.status(handle)
    except (MlinfraError, TimeoutError):
        return []  # who could tell is not installed here, or does not answer
    if status.alive:
        return []
    if stop:
        close_ended(ledger, known, status)
        with anyio.move_on_after(_STOPPING):
            await provider.stop(handle)
    return [Finding("gone", known.provider, known.id, known.name, True, status.reason)]


def _judged(ledger: Ledger, target: str, handle: Handle, known: Machine | None) -> Finding | None:
    """What is wrong with a machine that a provider has; None if it is wanted."""
    if known is None:
        if handle.key.startswith(ledger.id):
            detail = "the ledger does not know it"
            return Finding("forgotten", target, handle.key, "", False, detail)
        return Finding("elsewhere", target, handle.key, "", False, "another computer started it")
    if known.stopped_at is not None:
        detail = f"it was taken for ended ({known.stop_reason})"
    elif not known.handle and abandoned(known):
        detail = "whoever launched it has died"
    else:
        return None
    return Finding("forgotten", target, handle.key, known.name, False, detail)


async def _dealt_with(
    ledger: Ledger, found: Finding, handle: Handle, stop: bool, everywhere: bool
) -> Finding:
    """Stop a machine, unless it is only to be shown; what it cost is on record then."""
    ours = found.what == "forgotten"
    if not stop or not (ours or everywhere):
        return found
    if ours and not found.name:
        key = ledger.intend_machine(
            name=handle.key, provider=found.target, price=Price.unknown(), key=handle.key
        )
        ledger.machine_started(key, handle=handle.to_json())
    try:
        with anyio.fail_after(_STOPPING):
            await providers.of(handle).stop(handle)
    except (MlinfraError, TimeoutError) as error:
        why = f"{found.detail}, and cannot be stopped: {error}"
        return msgspec.structs.replace(found, detail=why)
    if ours:
        ledger.machine_outlived(handle.key, reason=_FORGOTTEN)
    return msgspec.structs.replace(found, stopped=True)


def _used(ledger: Ledger) -> list[str]:
    """Targets where machines of ours were lately, whatever the settings say now."""
    now = time.time()
    return [
        machine.provider
        for machine in ledger.machines()
        if machine.stopped_at is None or abs(now - machine.stopped_at) < _RECENT
    ]
