"""What ``%remote status``, ``machines`` and ``stop NAME`` print."""

from __future__ import annotations

import sys
import time

from mlinfra_sdk import cli_catalog, cli_cost, units
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.ledger import Ledger, Machine
from mlinfra_sdk.ledger.report import report
from mlinfra_sdk.machines import claim, ends, lifecycle
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Resolved, did_you_mean
from mlinfra_sdk.sync.reports import Move, Report
from mlinfra_sdk.worker.messages import RunInfo


def show_status(resolved: Resolved, session: Session | None) -> None:
    """This notebook's machine, then every setting with its origin."""
    machine = session.machine if session is not None else None
    if session is None or machine is None:
        print("No machine yet; the next %%remote cell starts one.")
    else:
        agent = session.agent()
        gpu = f" with {machine.offer.gpu}" if machine.offer.gpu else ""
        rate = machine.offer.price.describe()
        print(f"Machine {machine.name} on {machine.target}{gpu}, {rate}")
        if agent is None:
            print("  not connected: it is looked for at the next cell")
        else:
            state = (
                "busy" if agent.busy else f"idle for {units.format_duration(agent.idle_seconds)}"
            )
            up = units.format_duration(time.time() - agent.started)
            cost = session.ledger.cost(machine.id)
            python, so_far = agent.versions["Python"], units.format_usd(cost.total)
            print(f"  up {up}, {state}, Python {python}, {so_far} so far")
            for line in ends.in_words(agent.ends, busy=agent.busy):
                print(f"  it stops by itself {line}")
        print(f"  hard stop: {machine.provider.capabilities.hard_stop_in_words}")
    print()
    show_settings(resolved)


def show_settings(resolved: Resolved) -> None:
    """Every setting, its value and where that comes from."""
    rows = resolved.rows()
    name_width = max(len(name) for name, _, _ in rows)
    value_width = max(len(value) for _, value, _ in rows)
    for name, value, origin in rows:
        print(f"{name:<{name_width}}  {value:<{value_width}}  {origin}")


def show_machines(ledger: Ledger, alive: list[Machine]) -> None:
    """Machines that run, with their cost so far."""
    if not alive:
        print("No machine runs.")
    agents = ends.describe(alive)
    for machine in alive:
        up = units.format_duration(time.time() - (machine.started_at or machine.intended_at))
        cost = units.format_usd(ledger.cost(machine.id).total)
        print(f"{machine.name}  on {machine.provider}  {machine.gpu or 'CPU'}  up {up}  {cost}")
        agent = agents.get(machine.id)
        if not machine.handle:
            print(f"  it starts: {claim.said(machine.name)}".removesuffix(": "))
            continue
        if agent is None:
            print("  it does not answer")
            continue
        for line in ends.in_words(agent.ends, busy=agent.busy):
            print(f"  stops {line}")


def show_cost(ledger: Ledger, by: str) -> None:
    """What was spent in the last 30 days."""
    cli_cost.show(report(ledger, by, since=cli_cost.moment("30d")))


def show_runs(runs: list[tuple[str, RunInfo]]) -> None:
    """Runs that go on, wait, or have ended and not been collected."""
    if not runs:
        print("No run goes on, and none waits to be collected.")
    for machine, info in runs:
        seconds = (info.ended or time.time()) - info.started
        state = info.status if info.ended else f"{info.status} for"
        what = f"{info.label or info.run}  on {machine}  {state} {units.format_duration(seconds)}"
        where = f"  from {info.notebook}" if info.notebook else ""
        progress = f"  {info.progress}" if info.progress is not None else ""
        print(f"{what}{progress}  {info.messages} messages{where}  {info.title}")


def show_moves(moves: list[Move]) -> None:
    """What a sync would move."""
    if not moves:
        print("Both sides are alike.")
    for move in moves:
        size = f"  {units.format_size(move.size)}" if move.size else ""
        print(f"{move.what:<12}  {move.path}{size}")
    total = sum(move.size for move in moves if move.what in ("send", "fetch"))
    if total:
        print(f"{units.format_size(total)} at most would move.")


def show_synced(report: Report) -> None:
    """What a sync has moved."""
    done = [
        f"{count} {'file' if count == 1 else 'files'} {what}"
        for count, what in (
            (report.sent, "sent"),
            (len(report.received), "fetched"),
            (report.removed_there, "deleted there"),
            (len(report.removed), "deleted here"),
        )
        if count
    ]
    print(f"{', '.join(done)}." if done else "Both sides are alike.")
    for warning in report.warnings:
        print(warning, file=sys.stderr)


def stop_named(ledger: Ledger, name: str) -> None:
    """Stop a machine that another notebook, or an earlier one, has started."""
    for machine in _named(ledger, name):
        portal().call(lifecycle.stop_known(machine, ledger, "stopped by the user"))
        print(f"{name} is stopped.")


def extend_named(ledger: Ledger, name: str, seconds: float) -> None:
    """Put the end of such a machine off."""
    for machine in _named(ledger, name):
        (line, *_) = ends.in_words(ends.extend(machine, seconds), busy=False)
        print(f"{name} stops {line}.")


def _named(ledger: Ledger, name: str) -> list[Machine]:
    alive = portal().call(lifecycle.settle(ledger))
    found = [machine for machine in alive if machine.name == name]
    if not found:
        names = [machine.name for machine in alive]
        raise RequestError(
            f"No machine {name!r} runs.{did_you_mean(name, names)}",
            hint=f"Running: {', '.join(names) or 'none'}.",
        )
    return found


def show_catalog(arguments: tuple[str, ...]) -> None:
    """GPUs and what they cost; ``--refresh`` asks providers first."""
    if "--refresh" in arguments:
        cli_catalog.refresh(())
    gpu = next((word for word in arguments if word != "--refresh"), "")
    cli_catalog.show(*cli_catalog.chosen(gpu, ""))
