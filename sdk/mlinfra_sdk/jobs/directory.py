"""The runs of all of a user's machines, whoever has started them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import msgspec

from mlinfra_sdk.errors import MlinfraError, RequestError
from mlinfra_sdk.ledger import Ledger, Machine
from mlinfra_sdk.machines import lifecycle
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.spec import Request, did_you_mean
from mlinfra_sdk.worker.messages import RunInfo

if TYPE_CHECKING:
    from mlinfra_sdk.session import Session


def runs_everywhere(
    session_on: Callable[[Machine], Session], complain: Callable[[str], None]
) -> Iterator[tuple[Session, RunInfo]]:
    """Every run that goes on, waits, or has ended and not been collected, with a session on its
    machine. Machines that do not answer are complained of."""
    ledger = Ledger.open()
    try:
        machines = portal().call(lifecycle.with_runs(ledger))
    finally:
        ledger.close()
    for machine in machines:
        try:
            session = session_on(machine)
            runs = session.runs()
        except MlinfraError as error:
            complain(f"{machine.name} does not answer: {error}")
            continue
        for info in runs:
            yield session, info


def request_for(machine: Machine, request: Request) -> Request:
    """A request that is met by this machine only."""
    return msgspec.structs.replace(request, on=machine.provider, machine=machine.name, gpu=None)


def the_run(name: str, found: Iterable[tuple[Session, RunInfo]]) -> tuple[Session, RunInfo]:
    """The run of this id or label; without a name the only one. Raises :class:`RequestError`."""
    known = list(found)
    matching = [it for it in known if name in ("", it[1].run, it[1].label)]
    if len(matching) == 1:
        return matching[0]
    if matching:
        problem = f"Several runs are called {name!r}." if name else "There are several runs."
        ids = ", ".join(f"{info.run} ({_where(session, info)})" for session, info in matching)
        raise RequestError(problem, hint=f"Name one by its id: {ids}.")
    names = [info.label or info.run for _, info in known]
    problem = f"There is no run {name!r}." if name else "There is no run."
    raise RequestError(
        f"{problem}{did_you_mean(name, names)}", hint=f"Runs: {', '.join(names) or 'none'}."
    )


def _where(session: Session, info: RunInfo) -> str:
    place = f"on {session.machine.name}" if session.machine else info.title
    return f"{info.label} {place}" if info.label else place
