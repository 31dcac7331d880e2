"""From a request to a machine, and to its end; every step is in the ledger before it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

import anyio
import anyio.to_thread
import msgspec

from mlinfra_sdk import predict, providers
from mlinfra_sdk.errors import LedgerError, MlinfraError, NoCapacity, ProviderError
from mlinfra_sdk.ledger import Ledger, Machine
from mlinfra_sdk.machines import budgets, consent, ends, market
from mlinfra_sdk.machines.claim import claimed, is_claimed
from mlinfra_sdk.providers.base import Handle, Offer, Provider, Status
from mlinfra_sdk.providers.waiting import beginning, listening, tell
from mlinfra_sdk.spec import Gpu, Request
from mlinfra_sdk.targets import AUTO

_LAUNCHING = 60.0
"""Seconds after an intent in which its launch is left alone in any case."""

_PARTING = 5.0
"""Seconds that an agent has to hear that it is stopped, and why."""

_CLOCKS_DIFFER = 600.0
"""Seconds that a launch is taken to last at most."""


@dataclass(frozen=True)
class LiveMachine:
    """A machine that runs, as this process knows it."""

    id: str
    name: str
    target: str
    """What ``on=`` calls the place that it comes from."""
    provider: Provider
    handle: Handle
    offer: Offer


async def acquire(
    request: Request,
    name: str,
    ledger: Ledger,
    say: Callable[[str], None] = lambda text: None,
    *,
    agreed: Collection[str] = (),
    notebook: str = "",
    cell: str = "",
) -> LiveMachine:
    """The machine of this name if it lives, else a new one by the best offer that has capacity.
    Processes that ask for the same name at the same time get the same machine.

    ``say`` is called, in some thread, with what is going to be started before it starts, and why
    an offer was not to be had after all. Raises :class:`NoCapacity` if that is so with all,
    :class:`~.consent.Unconfirmed` if the user has to be asked before (and has not ``agreed``), and
    :class:`BudgetSpent`. ``notebook`` and ``cell`` (a ``cell_key``) are those that need it.
    """
    async with claimed(name) as announce:
        unfinished = ""
        for known in ledger.machines(active=True):
            if request.target not in (AUTO, known.provider) or known.name != name:
                continue
            if not known.handle:  # whoever launched it was killed before it was done
                unfinished = known.id
                request = msgspec.structs.replace(request, on=known.provider)
                continue
            handle = Handle.from_json(known.handle)
            provider = providers.of(handle)
            status = await provider.status(handle)
            if status.alive:
                offer = _offer_of(known)
                return LiveMachine(known.id, name, known.provider, provider, handle, offer)
            close_ended(ledger, known, status)
            await provider.stop(handle)
        with listening(announce):
            tell("asking what there is and what it costs")
            found = await market.offers(request)
            purpose = Purpose(name, agreed, notebook, cell)
            return await _launch_one(found, request, purpose, ledger, unfinished, say)


@dataclass(frozen=True)
class Purpose:
    """What a machine is wanted for: its name, what its user has agreed to, and who asks."""

    name: str
    agreed: Collection[str]
    notebook: str
    cell: str


async def _launch_one(
    found: market.Market,
    request: Request,
    purpose: Purpose,
    ledger: Ledger,
    unfinished: str,
    say: Callable[[str], None],
) -> LiveMachine:
    first = found.quotes[0]
    here = predict.calibrate(measure=False)  # to measure now would hold the launch up
    known = predict.estimate(ledger, purpose.notebook, purpose.cell, [first.kind], here=here)[0]
    said, hint = market.announcement(found, request, known), ""
    for number, quote in enumerate(found.quotes):
        if number:
            said = f"{said} Now {quote}."
        budgets.check_price(request, purpose.notebook, quote.offer.price, quote.target)
        consent.check(quote, request, purpose.agreed, said)
        if said:
            await anyio.to_thread.run_sync(say, said)
        chosen = msgspec.structs.replace(request, on=quote.target)
        try:
            return await _launch(quote.provider, quote.offer, chosen, purpose, ledger, unfinished)
        except NoCapacity as error:
            said = f"{said} {quote.target} has no capacity: {error.message}".strip()
            hint, unfinished = error.hint, ""
    raise NoCapacity(said, hint=hint or "Try again later, or allow another GPU: gpu=A10|L4.")


def _offer_of(known: Machine) -> Offer:
    gpu = Gpu(known.gpu, known.gpu_count) if known.gpu else None
    return Offer(known.provider, gpu, known.price, 0.0)


async def _launch(
    provider: Provider,
    offer: Offer,
    request: Request,
    purpose: Purpose,
    ledger: Ledger,
    unfinished: str,
) -> LiveMachine:
    """The intent is written first: a crash at any later point leaves a trace to be swept, or to
    be gone on with by the next launch of this name (``unfinished`` is the id of such a one)."""
    gpu, name = offer.gpu, purpose.name
    machine_id = unfinished or ledger.intend_machine(
        name=name,
        provider=request.on,
        price=offer.price,
        gpu=gpu.name if gpu else "",
        gpu_count=gpu.count if gpu else 0,
    )
    begun_before = await _begun_before(unfinished, ledger)
    asked = time.time()
    began = None
    try:
        paid = budgets.share(ledger, _known(ledger, machine_id), request, purpose.notebook)
        if paid is not None:
            request = msgspec.structs.replace(request, paid=paid.seconds, paid_by=paid.budget)
        previous = await _previous(request.on, name, ledger)
        with beginning() as began:
            handle = await provider.launch(offer, request, machine_id, previous)
    except BaseException as error:
        reason = "the launch was cancelled" if not isinstance(error, Exception) else str(error)
        with suppress(LedgerError):
            if began is not None and began.at is not None:  # it has cost something all the same
                ledger.machine_started(machine_id, at=begun_before or began.at)
            ledger.machine_stopped(machine_id, reason=reason[:500])
        if isinstance(error, OSError) and not isinstance(error, MlinfraError):
            raise ProviderError(f"on={request.on} could not start a machine: {error}.") from error
        raise
    started = begun_before or began.at or asked
    try:
        ledger.machine_started(machine_id, handle=handle.to_json(), at=started)
    except LedgerError:  # what nobody can find again must not go on
        with anyio.CancelScope(shield=True):
            await provider.stop(handle)
        raise
    return LiveMachine(machine_id, name, request.on, provider, handle, offer)


def _known(ledger: Ledger, machine_id: str) -> Machine:
    return next(it for it in ledger.machines() if it.id == machine_id)


def close_lost(ledger: Ledger, machine: LiveMachine, status: Status) -> None:
    """The same for a machine as this process knows it."""
    close_ended(ledger, _known(ledger, machine.id), status)


async def _begun_before(unfinished: str, ledger: Ledger) -> float | None:
    """When the launch that is gone on with began, if it has come so far as to cost something."""
    for known in ledger.machines(active=True):
        if known.id == unfinished and await _find(known) is not None:
            return known.intended_at
    return None


def close_ended(ledger: Ledger, known: Machine, status: Status) -> None:
    """Close a machine that is gone, with the end that its provider or host tells. If that does not
    go with how long it has lived, a clock was set meanwhile, and its own length counts."""
    at = status.ended_at
    if at is not None and status.seconds is not None and known.started_at is not None:
        launched = at - known.started_at - status.seconds
        if not -_CLOCKS_DIFFER < launched < _CLOCKS_DIFFER:
            at = known.started_at + status.seconds
    ledger.machine_stopped(known.id, reason=status.reason, at=at)


async def stop(machine: LiveMachine, ledger: Ledger, reason: str) -> None:
    """End a machine and close it in the ledger."""
    await machine.provider.stop(machine.handle)
    ledger.machine_stopped(machine.id, reason=reason)


async def stop_known(known: Machine, ledger: Ledger, reason: str) -> None:
    """End a machine that the ledger knows. Its agent is told why first, if it can be: whoever runs
    a cell there must not take its end for an accident and start another one."""
    handle = await _find(known)
    if handle is not None:
        with anyio.move_on_after(_PARTING), suppress(MlinfraError, OSError):
            await anyio.to_thread.run_sync(ends.stop, known, reason, abandon_on_cancel=True)
        await providers.of(handle).stop(handle)
        if known.started_at is None:
            ledger.machine_outlived(known.id, reason=reason)
    ledger.machine_stopped(known.id, reason=reason)


async def settle(ledger: Ledger) -> list[Machine]:
    """Close in the ledger what is gone in fact; gives the machines that live.

    A machine whose launch was intended but never confirmed is looked for by its key.
    """
    alive = []
    for known in ledger.machines(active=True):
        try:
            handle = await _find(known)
            provider = providers.of(handle) if handle is not None else None
        except MlinfraError:
            alive.append(known)  # who could tell is not installed here, or does not answer
            continue
        if handle is None or provider is None:
            if abandoned(known):
                ledger.machine_stopped(known.id, reason="it never started")
            continue
        status = await provider.status(handle)
        if status.alive:
            alive.append(known)
        else:
            close_ended(ledger, known, status)
            await provider.stop(handle)
    return alive


def abandoned(known: Machine) -> bool:
    """Whether nobody is launching this machine any more, which was not confirmed to run."""
    return abs(time.time() - known.intended_at) > _LAUNCHING and not is_claimed(known.name)


async def with_runs(ledger: Ledger) -> list[Machine]:
    """Machines that live, and those that have ended and left runs to be collected."""
    alive = await settle(ledger)
    return [*alive, *(machine for _, machine in await _remains(ledger.machines(active=False)))]


async def _remains(machines: Sequence[Machine]) -> list[tuple[Handle, Machine]]:
    """What of these ended machines is left: it is found again by starting one of the same name."""
    found: list[tuple[Handle, Machine]] = []
    known = {machine.id: machine for machine in machines}

    async def ask(on: str) -> None:
        with suppress(MlinfraError):  # gone from the settings, or it cannot be reached
            for handle in await providers.load(on).remains():
                if handle.key in known:
                    found.append((handle, known[handle.key]))

    async with anyio.create_task_group() as tasks:
        for on in sorted({machine.provider for machine in machines}):
            tasks.start_soon(ask, on)
    return found


async def _previous(on: str, name: str, ledger: Ledger) -> Handle | None:
    """The machine of this name before, if it has left something."""
    ended = [it for it in ledger.machines(active=False) if (it.provider, it.name) == (on, name)]
    return next((handle for handle, _ in await _remains(ended)), None)


async def _find(known: Machine) -> Handle | None:
    """Where a machine is; one whose launch was not confirmed may be known to its provider."""
    if known.handle:
        return Handle.from_json(known.handle)
    for handle in await providers.load(known.provider).list():
        if handle.key == known.id:
            return handle
    return None
