"""When machines end: asked of their agents, put off, brought about, and put into words."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

from mlinfra_sdk import paths, providers, units
from mlinfra_sdk.errors import MlinfraError
from mlinfra_sdk.ledger import Machine
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.providers.base import Handle
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.watchdog import End

T = TypeVar("T")

EXTENSION = 1800.0
"""Seconds by which ``extend`` puts an end off if nothing is said."""
_AT_ONCE = 8


def describe(known: Sequence[Machine]) -> dict[str, m.AgentInfo]:
    """What the agents of these machines say of themselves, by the machine's id; those that do not
    answer are left out."""
    found: dict[str, m.AgentInfo] = {}
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as threads:
        asked = {it.id: threads.submit(_ask, it, m.Describe(1), m.AgentInfo) for it in known}
    for machine, answer in asked.items():
        if answer.exception() is None:
            found[machine] = answer.result()
        elif not isinstance(answer.exception(), MlinfraError):
            answer.result()
    return found


def extend(known: Machine, seconds: float) -> list[End]:
    """Have a machine not end for being idle, nor for its time, before so many seconds from now."""
    return _ask(known, m.Extend(1, seconds), list[End])


def stop(known: Machine, reason: str) -> None:
    """Have a machine's agent end, and tell this reason to all who have something run on it."""
    with _connected(known) as client:
        client.send(m.Stop(client.next_id(), reason)).result()


def _ask(known: Machine, request: m.AnyRequest, kind: type[T]) -> T:
    with _connected(known) as client:
        return client.ask(request, kind)


@contextlib.contextmanager
def _connected(known: Machine) -> Iterator[AgentClient]:
    """A machine's agent, by a connection for one request."""
    if not known.handle:
        raise MlinfraError(f"The machine {known.name} is still starting.", hint="Try again later.")
    handle = Handle.from_json(known.handle)
    provider = providers.of(handle)
    client = AgentClient.open(
        portal(),
        lambda: provider.connect(handle),
        portal().call(provider.secret(handle)),
        ChunkStore(paths.data_dir() / "store"),
    )
    try:
        yield client
    finally:
        client.close()


def in_words(ends: Sequence[End], *, busy: bool) -> list[str]:
    """A line for each end, the next one first; while it is ``busy`` a machine is not idle."""
    return [_line(end, busy) for end in ends]


def _line(end: End, busy: bool) -> str:
    left = units.format_duration(end.seconds)
    if end.cause == "idle":
        return f"after {left} without work" if busy else f"in {left} without work (idle)"
    if end.cause == "lease":
        return f"in {left} without a word from any client (lease)"
    if end.cause == "preemption":
        return f"in {left} at the latest: {end.reason}"
    if end.cause == "time":
        return f"in {left} in any case (time)"
    return f"in {left} for its money ({end.reason.partition(': ')[2]})"


def notice(end: End) -> str:
    """What a user is told when an end is near."""
    left = units.format_duration(round(end.seconds))
    if end.cause == "run":
        what = end.reason.partition(": ")[2]
        if end.seconds > 0:
            return f"{left} of this run's budget are left ({what})."
        return f"This run was stopped: {end.reason}."
    if end.cause == "budget":
        what = end.reason.partition(": ")[2]
        return f"The machine stops in {left}: its budget is nearly spent ({what})."
    if end.cause == "preemption":
        return f"The machine is taken away in {left}: {end.reason}."
    why = {
        "idle": "nothing runs on it",
        "time": "its time= is over then",
        "lease": "no client was heard of",
    }[end.cause]
    return f"The machine stops in {left}: {why}. `%remote extend` puts that off."
