"""What each operation of the server does."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mlinfra_sdk import cli_catalog, cli_quote, paths, providers, spec, targets, units
from mlinfra_sdk.catalog import catalog, is_stale
from mlinfra_sdk.catalog.prices import Fit
from mlinfra_sdk.cli_cost import BASIS, moment
from mlinfra_sdk.errors import MlinfraError, RequestError, did_you_mean
from mlinfra_sdk.ledger import Machine as MachineRecord
from mlinfra_sdk.ledger.report import GROUPS, report
from mlinfra_sdk.machines import lifecycle, market
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.worker import messages as m

from . import config, logs
from . import messages as t
from .observers import ask, tell
from .views import by_id

if TYPE_CHECKING:
    from .watcher import Watcher

_CHECKED_FOR = 30.0
"""Seconds for which it is remembered what targets lack."""


class NotFound(MlinfraError):
    """There is no such machine or run."""


class Service:
    """Answers questions; every method raises only :class:`MlinfraError`."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._targets: tuple[float, t.Targets] | None = None
        self._writing = asyncio.Lock()

    # -- what goes on, and what was ----------------------------------------------------------

    async def state(self, query: t.Nothing) -> t.State:
        """All that goes on now."""
        return await self._watcher.state()

    async def machines(self, query: t.MachinesQuery) -> t.Page[t.Machine]:
        """Machines, newest first."""
        before = _cursor(query.cursor)
        ledger = self._watcher.ledger()
        found = sorted(
            await asyncio.to_thread(ledger.machines),
            key=lambda machine: (machine.intended_at, machine.id),
            reverse=True,
        )
        if before is not None:
            found = [it for it in found if (it.intended_at, it.id) < before]
        items = []
        for machine in found[: query.limit]:
            cost = await asyncio.to_thread(ledger.cost, machine.id)
            runs = await asyncio.to_thread(ledger.runs, machine.id)
            notebook = runs[-1].notebook if runs else ""
            items.append(self._watcher.views.machine(machine, cost, notebook))
        more = len(found) > query.limit
        return t.Page(items, f"{items[-1].intended_at!r}:{items[-1].id}" if more else "")

    async def runs(self, query: t.RunsQuery) -> t.Page[t.Run]:
        """Runs, newest first."""
        before = _cursor(query.cursor)
        number = int(before[1]) if before is not None and before[1].isdecimal() else 0
        ledger = self._watcher.ledger()
        start = None if before is None else (before[0], min(number, (1 << 63) - 1))
        found = await asyncio.to_thread(ledger.latest_runs, query.limit + 1, start)
        machines = by_id(await asyncio.to_thread(ledger.machines))
        page = found[: query.limit]
        costs = {
            machine_id: await asyncio.to_thread(ledger.cost, machine_id)
            for machine_id in {run.machine_id for run in page}
        }
        items = [
            self._watcher.views.run(
                run, machines[run.machine_id], costs[run.machine_id].runs.get(run.id, 0)
            )
            for run in page
        ]
        more = len(found) > query.limit
        return t.Page(items, f"{page[-1].opened_at!r}:{page[-1].id}" if more else "")

    async def costs(self, query: t.CostsQuery) -> t.Costs:
        """What was spent."""
        if query.by not in GROUPS:
            raise RequestError(
                f"by={query.by} is not understood.{did_you_mean(query.by, GROUPS)}",
                hint=f"Accepted: {', '.join(GROUPS)}.",
            )
        since = moment(query.since)
        until = moment(query.until) if query.until else time.time()
        ledger = self._watcher.ledger()
        rows = await asyncio.to_thread(report, ledger, query.by, since=since, until=until)
        return t.Costs(
            [
                t.CostRow(
                    {key: str(value) for key, value in row.labels.items()},
                    row.cost / units.MICRO,
                    None if row.billed is None else row.billed / units.MICRO,
                    row.seconds,
                    row.runs,
                )
                for row in rows[query.offset : query.offset + query.limit]
            ],
            len(rows),
            sum(row.cost for row in rows) / units.MICRO,
            BASIS,
        )

    # -- what could be had -------------------------------------------------------------------

    async def catalog(self, query: t.CatalogQuery) -> t.Offers:
        """Accelerators and what they cost."""
        _, fits = await asyncio.to_thread(cli_catalog.chosen, query.gpu, query.provider)
        page = fits[query.offset : query.offset + query.limit]
        return t.Offers([_offer(fit) for fit in page], len(fits))

    async def targets(self, query: t.Nothing) -> t.Targets:
        """What on= may name, and what each lacks."""
        known = self._targets
        if known is None or time.monotonic() - known[0] > _CHECKED_FOR:
            found = await asyncio.to_thread(lambda: [_target(name) for name in targets.names()])
            known = self._targets = (time.monotonic(), t.Targets(found))
        return known[1]

    async def quotes(self, query: t.QuotesQuery) -> t.Quotes:
        """What can be had for a request; providers are asked."""
        pairs = {"gpu": query.gpu, "on": query.on}
        values = {key: value for key, value in pairs.items() if value}
        layer = spec.parse(values, place=spec.CELL, origin="the query")
        request = spec.resolve([*spec.configured(self._watcher.views.folder("")), layer]).request
        found = await asyncio.wrap_future(portal().submit(market.offers(request)))
        items = [_quote(it) for it in found.quotes]
        if query.run:
            run = await asyncio.to_thread(self._watcher.ledger().run, int(query.run))
            if run is None:
                raise NotFound("There is no such run.")
            known = await asyncio.to_thread(cli_quote.predictions, found, run.notebook, run.cell)
            for item, it in zip(items, known, strict=True):
                if it is not None:
                    item.estimate = t.Estimate(it.seconds, it.low, it.high, it.basis)
        return t.Quotes(items, [*found.notes, *found.missing])

    async def settings(self, query: t.SettingsQuery) -> t.Settings:
        """Every setting with its origin."""
        folder = self._watcher.views.folder(query.path)
        if folder is None:
            raise RequestError(
                f"There is no folder {query.path!r}.", hint="Name one below the server's root."
            )
        return await asyncio.to_thread(_settings, folder)

    # -- acts --------------------------------------------------------------------------------

    async def stop(self, machine_id: str, query: t.Nothing) -> t.Done:
        """End a machine."""
        machine = await self._machine(machine_id)
        ledger = self._watcher.ledger()
        stopping = lifecycle.stop_known(machine, ledger, "stopped by the user")
        await asyncio.wrap_future(portal().submit(stopping))
        self._watcher.touched()
        return t.Done(f"{machine.name} is stopped.")

    async def extend(self, machine_id: str, query: t.Nothing, body: t.Extension) -> t.Done:
        """Put off a machine's end for being idle, and for its time."""
        machine = await self._machine(machine_id)
        async with self._watcher.observers.client(machine) as client:
            await tell(client, m.Extend(client.next_id(), body.seconds))
        self._watcher.touched()
        return t.Done(
            f"{machine.name} does not stop for {units.format_duration(body.seconds)}"
            " unless its budget is spent."
        )

    async def cancel(self, run_id: str, query: t.Nothing) -> t.Done:
        """Interrupt a run, take it out of the queue, or discard what it has left."""
        machine, number = await self._run(run_id)
        async with self._watcher.observers.client(machine) as client:
            info = await _info(client, number)
            if info.ended:  # it is forgotten there: it is closed here before
                await self._watcher.state()
            await tell(client, m.Cancel(client.next_id(), info.run))
        self._watcher.touched()
        what = "discarded" if info.ended else "cancelled"
        return t.Done(f"{info.label or info.run} is {what}.")

    async def log(self, run_id: str, query: t.LogQuery) -> t.Log:
        """What a run has printed."""
        machine, number = await self._run(run_id)
        async with self._watcher.observers.client(machine) as client:
            info = await _info(client, number)
        async with self._watcher.observers.own_client(machine) as client:
            return await logs.read(client, info, query.after)

    async def change_settings(self, query: t.Nothing, body: t.SettingsChange) -> t.Settings:
        """Write settings into the user's config.toml, all that are given or none."""
        folder = self._watcher.views.folder("")
        async with self._writing:  # each reads what the one before has written
            # A file that is not understood is mended by hand and not written over.
            await asyncio.to_thread(spec.configured, folder)
            await asyncio.to_thread(config.write, msgspec.to_builtins(body))
        return await asyncio.to_thread(_settings, folder)

    async def _machine(self, machine_id: str) -> MachineRecord:
        known = await asyncio.to_thread(lambda: self._watcher.ledger().machines(active=True))
        for machine in known:
            if machine.id == machine_id:
                return machine
        raise NotFound("No such machine runs.", hint="It may have ended already.")

    async def _run(self, run_id: str) -> tuple[MachineRecord, int]:
        """The machine that has a run, and the run's number."""
        number = int(run_id)
        run = await asyncio.to_thread(lambda: self._watcher.ledger().run(number))
        if run is None:
            raise NotFound("There is no such run.")
        try:
            return await self._machine(run.machine_id), number
        except NotFound:
            raise NotFound(
                "The machine of this run has ended.",
                hint="`%remote attach` in a notebook looks for what it has left.",
            ) from None


async def _info(client: AgentClient, number: int) -> m.RunInfo:
    observed = await ask(client, m.Observe(client.next_id()), m.Observed)
    for info in observed.runs:
        if info.ledger == number:
            return info
    raise NotFound(
        "The machine has this run no longer.", hint="Its outputs are in the notebook that took it."
    )


def _cursor(text: str) -> tuple[float, str] | None:
    if not text:
        return None
    moment, _, rest = text.partition(":")
    try:
        return float(moment), rest
    except ValueError:
        raise RequestError(
            f"cursor={text!r} is not understood.", hint="Give the `next` of the page before."
        ) from None


def _settings(folder: Path | None) -> t.Settings:
    file = str(paths.config_file())
    layers = spec.configured(folder)
    own = next((layer.values for layer in layers if layer.origin == file), {})
    items = []
    for name, value, origin in spec.resolve(layers).rows():
        setting = spec.SETTINGS[name]
        writable = name in t.SettingsChange.__struct_fields__
        items.append(
            t.Setting(
                name=name,
                value=value,
                origin=origin,
                help=setting.help,
                example=setting.example,
                default=setting.kind.show(setting.default),
                own=setting.kind.show(own[name]) if name in own else "",
                writable=writable,
                suggestions=list(setting.kind.suggestions()) if writable else [],
            )
        )
    return t.Settings(items, file)


def _offer(fit: Fit) -> t.Offer:
    rate = fit.rate
    memory = catalog().memory(fit.gpu.name)
    return t.Offer(
        gpu=fit.gpu.name,
        count=fit.gpu.count,
        memory_gb=memory // 10**9 or None,
        vendor=rate.vendor,
        sku=rate.sku,
        region=rate.region,
        spot=rate.spot,
        usd_per_hour=fit.micro_per_hour / units.MICRO,
        source=rate.source,
        date=rate.date,
        stale=is_stale(rate.date),
        trust=rate.trust,
    )


def _target(name: str) -> t.Target:
    try:
        target = targets.find(name)
        provider = providers.load(name)
        needs = type(provider).argument
        if needs and target == targets.Target(name, name):
            return t.Target(
                name,
                target.provider,
                False,
                f"It needs its {needs}.",
                f"Write on={name}:{needs.upper()}.",
            )
        problems = provider.check()
    except (MlinfraError, ValueError) as error:
        hint = error.hint if isinstance(error, MlinfraError) else ""
        return t.Target(name, "", False, getattr(error, "message", str(error)), hint)
    except Exception as error:  # a third party's provider must not hide the others
        return t.Target(name, "", False, f"{type(error).__name__}: {error}")
    if problems:
        return t.Target(name, target.provider, False, problems[0].what, problems[0].mend)
    return t.Target(name, target.provider, True)


def _quote(quote: market.Quote) -> t.Quote:
    offer = quote.offer
    return t.Quote(
        target=quote.target,
        gpu=offer.gpu.name if offer.gpu else "",
        count=offer.gpu.count if offer.gpu else 0,
        usd_per_hour=offer.price.micro_per_hour / units.MICRO if offer.price.known else None,
        price=offer.price.describe(),
        start_seconds=offer.start_seconds,
    )
