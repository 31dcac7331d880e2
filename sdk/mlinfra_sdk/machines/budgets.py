"""Budgets: what of them a machine may use, held for it in the ledger, and how long that lasts.

Money of a notebook or a month is shared by machines that do not know of each other, and has to
last while nobody is there to watch. So each machine is given a share when it starts, in one
transaction of the ledger, and its own watchdog ends it when that is used up. While a client is
connected it asks for more. What an ended machine has not used is free again by itself: only its
cost counts then.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from mlinfra_sdk import units
from mlinfra_sdk.errors import BudgetSpent, RequestError
from mlinfra_sdk.ledger import Ledger, Machine, Price
from mlinfra_sdk.spec import Request

_AT_LEAST_SECONDS = 3600.0
"""A share lasts for so long, or for half of what is left if that is longer."""
_SHORTEST = 60.0
"""A machine is not started for less than so many seconds."""
_TEARDOWN = 5.0
"""Seconds of a share that are kept for the machine's end."""
WARN = 0.8


@dataclass(frozen=True)
class Share:
    """How long a machine is paid for: ``seconds`` from now, by the budget that is tightest for it,
    in words. ``warnings`` are sentences about budgets of which 80 % are spent, by their name."""

    seconds: float
    budget: str
    warnings: dict[str, str]


def limits(request: Request, notebook: str) -> dict[str, tuple[int, str]]:
    """The scopes of shared budgets, each with its limit in micro-USD and how the user wrote it."""
    found = {}
    if request.notebook_budget is not None and notebook:
        found[f"notebook:{notebook}"] = (request.notebook_budget, "notebook_budget")
    if request.month_budget is not None:
        month = time.strftime("%Y-%m")
        found[f"month:{month}"] = (request.month_budget, "month_budget")
    return found


def check_price(request: Request, notebook: str, price: Price, target: str) -> None:
    """Raises :class:`RequestError` if a budget is set and nobody states a price."""
    names = [name for _, name in limits(request, notebook).values()]
    names += ["machine_budget"] if request.machine_budget is not None else []
    names += ["budget"] if request.budget is not None else []
    if names and not price.known:
        raise RequestError(
            f"{names[0]}= cannot be kept on {target}: nobody states its price.",
            hint=f"State it below [prices] of config.toml, or write {names[0]}=none.",
        )


def run_seconds(request: Request, price: Price) -> float | None:
    """How long a run may take by ``budget=``; None: as long as it likes."""
    if request.budget is None or not price.micro_per_hour:
        return None
    return request.budget / price.micro_per_hour * 3600


def share(
    ledger: Ledger, machine: Machine, request: Request, notebook: str, *, all_of_it: bool = False
) -> Share | None:
    """What this machine may use from now on; None: it costs nothing, or there is no budget.

    ``all_of_it`` asks for all that is left, for work that goes on when nobody is connected.
    Raises :class:`BudgetSpent` if too little is left for it to start, or to go on.
    """
    price, scopes = machine.price, limits(request, notebook)
    rate = price.micro_per_hour
    if not rate or (not scopes and request.machine_budget is None):
        return None
    started = machine.started_at or machine.intended_at
    cost = ledger.cost(machine.id).total
    granted, tightest = _most(request, cost, rate)
    warnings = {}
    if scopes:
        left = granted
        for scope, (limit, name) in scopes.items():
            spent, held = ledger.scope_use(scope, without=machine.id)
            others, spent = spent + held, spent + cost
            if limit - others < left:
                left, tightest = limit - others, name
            if spent >= WARN * limit:
                warnings[name] = (
                    f"{100 * spent // limit} % of {name}={_usd(limit)} are spent: "
                    f"{units.format_usd(spent)}."
                )
        wanted = left
        if not all_of_it:
            wanted = min(
                left, cost + max(round(rate * _AT_LEAST_SECONDS / 3600), (left - cost) // 2)
            )
        granted = ledger.allot(machine.id, {key: it[0] for key, it in scopes.items()}, wanted)
    if request.machine_budget is not None and cost >= WARN * request.machine_budget:
        warnings["machine_budget"] = (
            f"{100 * cost // request.machine_budget} % of machine_budget="
            f"{_usd(request.machine_budget)} are spent: {units.format_usd(cost)}."
        )
    seconds = _payable(granted, price) - (time.time() - started)
    if seconds <= (_SHORTEST if not machine.started_at else 0.0):
        raise _spent(ledger, tightest, scopes, request)
    amounts = {name: limit for limit, name in scopes.values()}
    amount = amounts.get(tightest, request.machine_budget or 0)
    return Share(seconds, f"{tightest}={_usd(amount)}", warnings)


def _most(request: Request, cost: int, rate: int) -> tuple[int, str]:
    """What the machine's own budget allows it."""
    if request.machine_budget is not None:
        return request.machine_budget, "machine_budget"
    return 1 << 62, ""


def _payable(amount: int, price: Price) -> float:
    """Seconds of a machine's life that an amount pays for, in the steps of its bill."""
    seconds = amount / price.micro_per_hour * 3600 - _TEARDOWN
    if price.granularity_s:
        seconds = math.floor(seconds / price.granularity_s) * price.granularity_s
    return seconds if seconds >= price.minimum_s else 0.0


def _spent(
    ledger: Ledger, name: str, scopes: dict[str, tuple[int, str]], request: Request
) -> BudgetSpent:
    for scope, (limit, its_name) in scopes.items():
        if its_name == name:
            spent, held = ledger.scope_use(scope)
            rest = f", {units.format_usd(held)} are held for machines that run" if held else ""
            return BudgetSpent(
                f"{name}={_usd(limit)} leaves nothing for a machine: "
                f"{units.format_usd(spent)} are spent{rest}.",
                hint=f"Stop machines that you do not need, or raise {name}=.",
            )
    return BudgetSpent(
        f"machine_budget={_usd(request.machine_budget or 0)} is spent.",
        hint="Raise it, or stop the machine: the next one has the whole again.",
    )


def _usd(micro: int) -> str:
    return units.format_usd(micro)
