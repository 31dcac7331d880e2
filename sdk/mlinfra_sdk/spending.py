"""A session's money: the question before a launch, and its machine's share of the budgets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import msgspec

from mlinfra_sdk import units
from mlinfra_sdk.errors import BudgetSpent
from mlinfra_sdk.frontend import Frontend, shown_while_waiting
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines import budgets, consent, lifecycle
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.machines.lifecycle import LiveMachine
from mlinfra_sdk.spec import Request
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.watchdog import OF_BUDGET, End

_FRESH = 5.0
"""Seconds for which it is not looked again at the budgets before a cell."""
_EVERY = 20.0
"""Seconds between two looks at the budgets while a run goes on."""


class Spender(Protocol):
    """What is needed of a session."""

    request: Request

    @property
    def ledger(self) -> Ledger: ...
    @property
    def machine(self) -> LiveMachine | None: ...
    @property
    def client(self) -> AgentClient | None:
        """The connection to the machine, if there is one."""
        ...


class Spending:
    """What one session may spend."""

    def __init__(self, session: Spender, notebook: str) -> None:
        self.cell = ""
        """Which cell is being run: what the ledger calls it."""
        self._session = session
        self._notebook = notebook
        self._share: budgets.Share | None = None
        self._looked = 0.0
        """When that was asked for, by the monotonic clock."""
        self._alone = False
        """Whether something was started that goes on when nobody is connected."""
        self._terms: tuple[int | None, ...] = ()
        """The budgets that it was asked of."""
        self._warned: set[str] = set()
        self._agreed: set[str] = set()
        """What the user has said yes to in this session."""
        self._goes_on = False

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Machines that are started in here are for a run that was cut off: what its user has
        agreed to holds for them, too, since by now there may be nobody to be asked."""
        before, self._goes_on = self._goes_on, True
        try:
            yield
        finally:
            self._goes_on = before

    def acquire(self, name: str, frontend: Frontend) -> LiveMachine:
        """The machine; the user is asked before one is started that costs much. Raises
        :class:`NotConfirmed` and :class:`BudgetSpent`."""
        agreed = set(self._agreed) if self._goes_on else set()
        while True:
            try:
                return shown_while_waiting(
                    lifecycle.acquire(
                        self._session.request,
                        name,
                        self._session.ledger,
                        frontend.note,
                        agreed=agreed,
                        notebook=self._notebook,
                        cell=self.cell,
                    ),
                    frontend,
                )
            except consent.Unconfirmed as waiting:
                question = waiting.question
            answer = frontend.confirm(str(question))
            if answer is None:
                why = f"nobody can be asked here. {question.reason}"
                raise question.refused(why.rstrip("."), consent.HOW)
            if not answer:
                raise question.refused("you said no")
            agreed |= consent.keys(question)
            self._agreed |= agreed
            if question.remember:
                consent.remember(question)

    def before_run(self, frontend: Frontend, *, all_of_it: bool = False) -> None:
        """Hold money of the budgets for the machine, and tell it how long that lasts; says once of
        each budget that most of it is spent. ``all_of_it`` is for a run that goes on when nobody
        is connected. Raises :class:`BudgetSpent`."""
        request = self._session.request
        terms = (request.machine_budget, request.notebook_budget, request.month_budget)
        fresh = terms == self._terms and time.monotonic() - self._looked < _FRESH
        if (self._share or self._limited) and (all_of_it or not fresh):
            self._terms = terms
            self._alone |= all_of_it
            self._pay(frontend)

    def _pay(self, frontend: Frontend) -> None:
        session = self._session
        request, machine, client = session.request, session.machine, session.client
        if machine is None or client is None:
            return
        self._looked = time.monotonic()
        before, self._share = self._share, None
        active = session.ledger.machines(active=True)
        known = next((it for it in active if it.id == machine.id), None)
        if known is not None and self._limited:
            budgets.check_price(request, self._notebook, known.price, machine.target)
            self._share = budgets.share(
                session.ledger, known, request, self._notebook, all_of_it=self._alone
            )
        if self._share is not None:
            client.send(m.Pay(client.next_id(), self._share.seconds, self._share.budget))
            for name, warning in self._share.warnings.items():
                if name not in self._warned:
                    self._warned.add(name)
                    frontend.note(warning)
        elif before is not None:
            client.send(m.Pay(client.next_id()))

    def look(self, frontend: Frontend) -> None:
        """While a run goes on: ask for more before the share is used up. When there is no more,
        the machine ends by itself, and gives notice before."""
        if self._limited and time.monotonic() - self._looked > _EVERY:
            with suppress(BudgetSpent):
                self._pay(frontend)

    @property
    def _limited(self) -> bool:
        """Whether a budget holds for the machine."""
        request = self._session.request
        return bool(budgets.limits(request, self._notebook)) or request.machine_budget is not None

    def ends(self) -> list[End]:
        """When the machine's share is used up."""
        if self._share is None:
            return []
        seconds = self._looked + self._share.seconds - time.monotonic()
        return [End("budget", seconds, f"{OF_BUDGET}: {self._share.budget}")]

    def cost(self, seconds: float) -> int:
        """Micro-USD of so many seconds on the present machine, as far as its price is known."""
        machine = self._session.machine
        if machine is None or not machine.offer.price.known:
            return 0
        return units.cost(machine.offer.price.micro_per_hour, seconds)

    def of_run(self, spent: int = 0) -> dict[str, Any]:
        """After how many seconds a run is stopped, and for which budget, for its request. ``spent``
        micro-USD of that went into attempts that were lost."""
        request, machine = self._session.request, self._session.machine
        if request.budget is None or machine is None:
            return {}
        price = machine.offer.price
        budgets.check_price(request, self._notebook, price, machine.target)
        if spent >= request.budget:
            raise BudgetSpent(f"budget={units.format_usd(request.budget)} of this run is spent.")
        left = msgspec.structs.replace(request, budget=request.budget - spent)
        seconds = budgets.run_seconds(left, price)
        return {"paid": seconds, "budget": f"budget={units.format_usd(request.budget)}"}
