"""What can be had for a request, of all providers that are set up, and what they ask for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import anyio
import anyio.to_thread
from msgspec.structs import replace

from mlinfra_sdk import providers, targets, units
from mlinfra_sdk.catalog import Gpus
from mlinfra_sdk.catalog.prices import Rate, store_live
from mlinfra_sdk.errors import MlinfraError, RequestError
from mlinfra_sdk.predict import Place, Prediction
from mlinfra_sdk.providers.base import Offer, Provider
from mlinfra_sdk.spec import Request
from mlinfra_sdk.targets import AUTO

T = TypeVar("T")

TEN_MINUTES = 600.0
PATIENCE = 15.0
"""Seconds that a provider has to answer."""


@dataclass(frozen=True)
class Quote:
    """An offer, and who makes it: ``target`` is what ``on=`` calls him."""

    target: str
    provider: Provider
    offer: Offer

    def __str__(self) -> str:
        """``A10 on modal at $1.10/h (modal.com, 2026-07-01)``."""
        what = str(self.offer.gpu) if self.offer.gpu is not None else "CPU"
        where = f"{self.target} ({self.offer.place})" if self.offer.place else self.target
        return f"{what} on {where} at {self.offer.price.describe()}"

    @property
    def kind(self) -> Place:
        """The kind of machine, for predictions."""
        gpu = self.offer.gpu
        return Place(self.target, gpu.name if gpu else "", gpu.count if gpu else 0)


@dataclass(frozen=True)
class Market:
    """Quotes for a request, the one to take first; ``notes`` says by a sentence each who has
    nothing or could not be asked, ``missing`` what those need who are not set up."""

    quotes: list[Quote] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


async def offers(request: Request) -> Market:
    """What can be had for a request: the most wanted GPU first, then the cheapest, an unknown
    price last. With ``on=auto`` every target that is set up is asked, at once and not for longer
    than :data:`PATIENCE`; one that fails is a note.

    Raises :class:`RequestError` if nothing fits.
    """
    market = Market()

    async def ask(target: str, provider: Provider) -> None:
        found = await provider.offers(replace(request, on=target))
        market.quotes.extend(Quote(target, provider, offer) for offer in found)
        if not found:
            market.notes.append(f"{target} has none.")

    if request.target != AUTO:
        await ask(request.target, providers.load(request.target))
    else:
        await ask_all(targets.names(), ask, market)
    market.quotes.sort(key=lambda quote: _order(quote.offer, request.gpu))
    market.notes.sort()
    market.missing.sort()
    if not market.quotes:
        said = " ".join([*market.notes, *market.missing])
        raise RequestError(
            f"gpu={request.gpu or 'none'} is not to be had.",
            hint=f"{said} `mlinfra doctor` says how to set providers up.",
        )
    return market


async def refresh_rates(names: Iterable[str] = ()) -> tuple[dict[str, int], list[str]]:
    """Ask the providers of these targets (default: all) for their rates and keep them; gives how
    many rates each gave, and a sentence about each that could not be asked."""
    chosen = tuple(names)
    counts: dict[str, int] = {}
    market = Market()

    async def ask(target: str, provider: Provider) -> None:
        hook: Callable[[], Awaitable[list[Rate]]] | None = getattr(provider, "rates", None)
        if hook is None:
            if chosen:
                market.notes.append(f"{target} does not tell its rates.")
            return
        rates = await hook()
        store_live(provider.name, rates)
        counts[provider.name] = len(rates)

    await ask_all(chosen or targets.names(), ask, market)
    return counts, sorted([*market.notes, *market.missing] if chosen else market.notes)


async def ask_all(
    names: Iterable[str],
    ask: Callable[[str, Provider], Awaitable[None]],
    market: Market,
    used: Collection[str] = (),
) -> None:
    """Ask all of these targets that are set up, at the same time; those that were ``used`` also if
    others of their provider need an argument."""

    async def ask_one(name: str) -> None:
        try:
            with anyio.fail_after(PATIENCE):
                provider = await anyio.to_thread.run_sync(
                    _set_up, name, name in used, abandon_on_cancel=True
                )
                if isinstance(provider, str):
                    market.missing.append(f"{name}: {provider}")
                else:
                    await ask(name, provider)
        except TimeoutError:
            market.notes.append(f"{name} did not answer within {PATIENCE:g} s.")
        except RequestError:
            market.notes.append(f"{name} has none.")
        except MlinfraError as error:
            market.notes.append(f"{name}: {error.message}")
        except Exception as error:  # a third party's provider must not hold the others up
            market.notes.append(f"{name} failed: {type(error).__name__}: {error}")

    async with anyio.create_task_group() as tasks:
        for name in names:
            tasks.start_soon(ask_one, name)


def _set_up(name: str, used: bool) -> Provider | str:
    """The provider of a target, or what it lacks."""
    provider = providers.load(name)
    needs = type(provider).argument
    if needs and not used and targets.find(name) == targets.Target(name, name):
        return f"It needs its {needs}, as in on={name}:{needs.upper()}."
    problems = provider.check()
    return problems[0].what if problems else provider


def _order(offer: Offer, wanted: Gpus | None) -> tuple[int, bool, int, float]:
    place = wanted.rank(offer.gpu) if wanted is not None and offer.gpu is not None else None
    last = len(wanted.alternatives) if wanted is not None else 0
    price = offer.price
    return (
        last if place is None else place,
        not price.known,
        price.micro_per_hour,
        offer.start_seconds,
    )


def announcement(market: Market, request: Request, known: Prediction | None = None) -> str:
    """What is going to be taken, to be said before it starts; about a machine that was named and
    costs nothing only what its provider notes. ``known`` is what the cell may take there."""
    first = market.quotes[0]
    price = first.offer.price
    if request.target != AUTO and price.known and not price.micro_per_hour:
        return first.offer.note
    said = [f"{first}."]
    if price.known and price.micro_per_hour:
        ten = units.format_usd(units.cost(price.micro_per_hour, TEN_MINUTES))
        start = units.format_duration(round(first.offer.start_seconds))
        said = [f"{first}: {ten} in 10 minutes; it starts in about {start}."]
        said += [known.describe(price.micro_per_hour)] if known is not None else []
    return " ".join(filter(None, [*said, first.offer.note, *market.notes]))
