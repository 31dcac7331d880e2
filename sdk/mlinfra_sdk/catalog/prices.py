"""What accelerators cost at whom: rates with their source and date.

Three places give rates, in this order of trust: what a provider was asked for
(:func:`store_live`), the user's own ``[prices]`` in ``config.toml``, and the file that this
package brings. A rate that nobody gives is unknown, never zero.
"""

from __future__ import annotations

import datetime
import functools
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from mlinfra_sdk import paths, units
from mlinfra_sdk.errors import RequestError

from .accelerators import catalog
from .gpus import Gpu, Gpus

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STALE_DAYS = 90
Trust = Literal["live", "yours", "bundled"]


class Rate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``count`` accelerators of a vendor cost for an hour.

    With ``up_to`` any number of them to that limit costs in proportion. ``sku`` is the vendor's own
    name for it, ``includes`` says whether the rest of the machine is in the price, ``source`` is
    the page that states it, ``via`` a public copy in which it was read, ``date`` the day (ISO).
    ``granularity_s`` and ``minimum_s`` are the billing's steps in seconds; None: not known.
    """

    vendor: str
    gpu: str
    usd_per_hour: float
    source: str
    date: str
    includes: Literal["gpu", "machine"] = "machine"
    count: int = 1
    up_to: int = 0
    sku: str = ""
    region: str = ""
    spot: bool = False
    granularity_s: float | None = None
    minimum_s: float | None = None
    via: str = ""
    note: str = ""
    trust: Trust = "bundled"

    @property
    def key(self) -> tuple[str, str, int, bool]:
        """What rates of different trust are about, to be compared."""
        return (self.vendor, self.gpu, self.count, self.spot)

    def for_count(self, count: int) -> int | None:
        """Micro-USD per hour of so many accelerators; None if it is not to be had."""
        if count == self.count:
            return round(self.usd_per_hour * units.MICRO)
        if self.up_to >= count and count % self.count == 0:
            return round(self.usd_per_hour * units.MICRO * count / self.count)
        return None


class Fit(msgspec.Struct, frozen=True):
    """A rate that meets a request: for what exactly, and micro-USD per hour of all of it."""

    gpu: Gpu
    micro_per_hour: int
    rate: Rate


class _Live(msgspec.Struct):
    """The stored answers of providers, by vendor."""

    rates: dict[str, tuple[Rate, ...]] = {}


@functools.cache
def bundled_rates() -> tuple[Rate, ...]:
    """The rates that this package brings; read at their first use."""
    data = Path(__file__).with_name("offers.json").read_bytes()
    return msgspec.json.decode(data, type=tuple[Rate, ...])


def current_rates() -> list[Rate]:
    """All rates, each key by the most trusted place that gives it."""
    bundled = bundled_rates()
    best: dict[tuple[str, str, int, bool], list[Rate]] = {}
    for rate in bundled:
        best.setdefault(rate.key, []).append(rate)
    for better in (_override_rates(), _live_rates()):
        fresh: dict[tuple[str, str, int, bool], list[Rate]] = {}
        for rate in better:
            fresh.setdefault(rate.key, []).append(_completed(rate, best.get(rate.key, ())))
        best.update(fresh)
    return [rate for rates in best.values() for rate in rates]


def _completed(rate: Rate, known: Sequence[Rate]) -> Rate:
    """A rate with the terms that the less trusted place knows and it does not say."""
    if len(known) != 1 or rate.up_to or rate.sku:
        return rate
    same = ("usd_per_hour", "source", "date", "trust", "via")
    return replace(known[0], **{name: getattr(rate, name) for name in same})


def rates_for(wanted: Gpus, vendor: str | None = None) -> list[Fit]:
    """The rates that meet a request: the most wanted alternative first, then the cheapest."""
    found = []
    for rate in current_rates():
        if vendor is not None and rate.vendor != vendor:
            continue
        for place, wish in enumerate(wanted.alternatives):
            micro = rate.for_count(wish.count)
            if micro is not None and wish.met_by(Gpu(rate.gpu, wish.count)):
                found.append((place, Fit(Gpu(rate.gpu, wish.count), micro, rate)))
                break
    return [fit for _, fit in sorted(found, key=lambda it: (it[0], it[1].micro_per_hour))]


def is_stale(date: str, today: datetime.date | None = None) -> bool:
    """Whether a price of this day (ISO) is too old to be believed: more than 90 days."""
    try:
        age = (today or datetime.date.today()) - datetime.date.fromisoformat(date)
    except ValueError:
        return True
    return age.days > STALE_DAYS


# -- the user's own ------------------------------------------------------------------------


def _override_rates() -> Iterator[Rate]:
    """``[prices]`` of the user's settings file: ``modal.A10 = 1.05`` in USD per hour."""
    path = paths.config_file()
    try:
        info = path.stat()
    except OSError:
        return iter(())
    return iter(_read_overrides(path, info.st_mtime_ns))


@functools.lru_cache(maxsize=4)
def _read_overrides(path: Path, mtime_ns: int) -> tuple[Rate, ...]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("prices", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return ()  # reading the settings says what is wrong with the file
    date = datetime.date.fromtimestamp(mtime_ns / 1e9).isoformat()
    return tuple(_overrides(table, path, date))


def _overrides(table: Any, path: Path, date: str) -> Iterator[Rate]:
    if not isinstance(table, dict):
        raise _malformed(path, "prices", table)
    for vendor, gpus in table.items():
        if not isinstance(gpus, dict):
            raise _malformed(path, vendor, gpus)
        for written, usd in gpus.items():
            name = catalog().canonical(written)
            if name is None:
                raise RequestError(
                    f"[prices] in {path} names an unknown GPU {written!r}."
                    f"{catalog().nearest(written)}",
                    hint="`mlinfra catalog` lists the names.",
                )
            if isinstance(usd, bool) or not isinstance(usd, (int, float)) or usd < 0:
                raise _malformed(path, f"{vendor}.{written}", usd)
            yield Rate(
                vendor=vendor,
                gpu=name,
                usd_per_hour=float(usd),
                source=str(path),
                date=date,
                trust="yours",
            )


def _malformed(path: Path, key: str, value: object) -> RequestError:
    return RequestError(
        f"{key} = {value!r} under [prices] in {path} is not understood.",
        hint="Write USD per hour below the vendor, such as modal.A10 = 1.05",
    )


# -- what providers answered ---------------------------------------------------------------


def _live_file() -> Path:
    return paths.data_dir() / "rates.json"


def _live_rates() -> Iterator[Rate]:
    path = _live_file()
    try:
        info = path.stat()
    except OSError:
        return
    for rates in _read_live(path, info.st_mtime_ns).rates.values():
        yield from rates


@functools.lru_cache(maxsize=4)
def _read_live(path: Path, _mtime_ns: int) -> _Live:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Live)
    except (OSError, msgspec.DecodeError):
        return _Live()  # written by another version: the next refresh replaces it


def store_live(vendor: str, rates: Iterable[Rate]) -> None:
    """Keep what a provider answered, in place of what it answered before."""
    path = _live_file()
    live = _read_live(path, path.stat().st_mtime_ns if path.exists() else 0)
    answered = tuple(replace(rate, trust="live") for rate in rates)
    data = msgspec.json.encode(_Live(live.rates | {vendor: answered}))
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=".rates-")  # 0600
    try:
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
