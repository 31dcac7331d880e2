"""``mlinfra status``, ``extend``, ``shell`` and ``stop``: the machines that run."""

from __future__ import annotations

import argparse
import subprocess
import time
from typing import Any

from rich.table import Table

from mlinfra_sdk import providers, spec, units
from mlinfra_sdk.errors import MlinfraError, RequestError
from mlinfra_sdk.ledger import Ledger, Machine
from mlinfra_sdk.machines import claim, ends, lifecycle
from mlinfra_sdk.machines.ends import in_words
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.providers.base import Handle, OpensShell
from mlinfra_sdk.terminal import console, print_json
from mlinfra_sdk.units import format_duration, format_usd
from mlinfra_sdk.worker.messages import AgentInfo


def dispatch(options: argparse.Namespace) -> int:
    """Carry out one of these commands; gives the exit status."""
    if options.command == "status":
        return _status(options.json)
    if options.command == "shell":
        return _shell(options.name)
    if options.command == "extend":
        return _extend(options.name, options.duration)
    return _stop(options.name, options.all)


def _status(as_json: bool) -> int:
    resolved = spec.resolve(spec.configured())
    ledger = Ledger.open()
    try:
        alive = _alive(ledger)
        month = time.mktime((*time.localtime()[:2], 1, 0, 0, 0, 0, 0, -1))
        cost = {machine.id: ledger.cost(machine.id).total for machine in alive}
        this_month, total = ledger.costs(since=month).best.total, ledger.costs().best.total
        agents = ends.describe(alive)
    finally:
        ledger.close()
    if as_json:
        print_json(
            {
                "machines": [
                    _as_json(machine, cost[machine.id], agents.get(machine.id)) for machine in alive
                ],
                "usd_this_month": this_month / 1e6,
                "usd_total": total / 1e6,
                "settings": {
                    name: {"value": value, "origin": origin}
                    for name, value, origin in resolved.rows()
                },
            }
        )
    else:
        _show_status(alive, cost, agents, this_month, total, resolved)
    return 0


def _alive(ledger: Ledger) -> list[Machine]:
    return portal().call(lifecycle.settle(ledger))


def _as_json(machine: Machine, cost: int, agent: AgentInfo | None) -> dict[str, Any]:
    return {
        "name": machine.name,
        "id": machine.id,
        "provider": machine.provider,
        "gpu": machine.gpu or None,
        "gpu_count": machine.gpu_count,
        "started_at": machine.started_at,
        "usd": cost / 1e6,
        "usd_per_hour": machine.price.micro_per_hour / 1e6 if machine.price.known else None,
        "price_source": machine.price.source,
        "price_date": machine.price.date,
        "waits": claim.said(machine.name) if not machine.handle else "",
        "busy": agent.busy if agent is not None else None,
        "ends": agent.ends if agent is not None else None,
    }


def _show_status(
    alive: list[Machine],
    cost: dict[str, int],
    agents: dict[str, AgentInfo],
    this_month: int,
    total: int,
    resolved: spec.Resolved,
) -> None:
    out = console()
    if alive:
        table = Table("machine", "on", "GPU", "up", "cost", "rate", box=None, pad_edge=False)
        for machine in alive:
            price = machine.price
            spent = format_usd(cost[machine.id]) if price.known else "unknown"
            table.add_row(
                machine.name,
                machine.provider,
                f"{machine.gpu}:{machine.gpu_count}" if machine.gpu else "none",
                format_duration(time.time() - (machine.started_at or machine.intended_at)),
                spent,
                price.describe(),
            )
        out.print(table)
        for machine in alive:
            agent = agents.get(machine.id)
            if not machine.handle:
                waits = claim.said(machine.name)
                out.print(f"{machine.name} starts{f': {waits}' if waits else ''}.")
            elif agent is None:
                out.print(f"{machine.name} does not answer.")
            else:
                lines = in_words(agent.ends, busy=agent.busy)
                out.print(f"{machine.name} stops {', or '.join(lines)}.")
    else:
        out.print("No machine runs.")
    out.print(
        f"Cost of all machines: {format_usd(this_month)} this month, {format_usd(total)} in all."
    )
    out.print()
    table = Table("setting", "value", "set in", box=None, pad_edge=False)
    for row in resolved.rows():
        table.add_row(*row)
    out.print(table)


# -- extend and stop -----------------------------------------------------------------------


def _extend(name: str | None, duration: str | None) -> int:
    # Both words may be left out; no name of a machine is a duration.
    seconds = ends.EXTENSION
    for word in filter(None, (name, duration)):
        try:
            seconds = units.parse_duration(word)
        except ValueError:
            if word is duration:
                raise RequestError(
                    f"{word!r} is no duration.", hint="Write it with a unit: 30m, 2h."
                ) from None
        else:
            name = None if word is name else name
    ledger = Ledger.open()
    try:
        chosen = _chosen(_alive(ledger), name)
    finally:
        ledger.close()
    for machine in chosen:
        (line, *_) = ends.in_words(ends.extend(machine, seconds), busy=False)
        print(f"{machine.name} stops {line}.")
    if not chosen:
        print("No machine runs.")
    return 0


def _stop(name: str | None, every: bool) -> int:
    from mlinfra_sdk.ledger import Ledger

    ledger = Ledger.open()
    try:
        alive = _alive(ledger)
        chosen = alive if every else _chosen(alive, name)
        for machine in chosen:
            portal().call(lifecycle.stop_known(machine, ledger, "stopped by the user"))
            print(f"{machine.name} is stopped.")
        if not chosen:
            print("No machine runs.")
    finally:
        ledger.close()
    return 0


def _shell(name: str | None) -> int:
    ledger = Ledger.open()
    try:
        chosen = _chosen(_alive(ledger), name)
    finally:
        ledger.close()
    if not chosen:
        raise MlinfraError("No machine runs.", hint="A cell with %%remote starts one.")
    (machine,) = chosen
    if not machine.handle:
        raise MlinfraError(f"The machine {machine.name} still starts.", hint="Try again later.")
    handle = Handle.from_json(machine.handle)
    provider = providers.of(handle)
    if not isinstance(provider, OpensShell):
        raise MlinfraError(
            f"on={machine.provider} has no way to open a shell.",
            hint="Run commands in a cell: `%%remote` and `!command`.",
        )
    return subprocess.call(provider.shell(handle))


def _chosen(alive: list[Machine], name: str | None) -> list[Machine]:
    if name is None and len(alive) <= 1:
        return alive
    found = [machine for machine in alive if machine.name == name]
    if found:
        return found
    names = [machine.name for machine in alive]
    hint = f"Running: {', '.join(names) or 'none'}."
    if name is None:
        raise MlinfraError("More than one machine runs; say which one, or --all.", hint=hint)
    raise MlinfraError(f"No machine {name!r} runs.{spec.did_you_mean(name, names)}", hint=hint)
