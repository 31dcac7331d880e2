"""What a user asks for: the settings, their values, and where each value came from.

:data:`SETTINGS` is the one table of everything that can be set. Parsing, completion, help and
``%remote status`` are derived from it, so a new setting is one new row and one field of
:class:`Request`.

Values come in layers, each overriding the one before: built-in, the user's ``config.toml``,
``[tool.mlinfra]`` of the nearest ``pyproject.toml``, ``MLINFRA_*`` environment variables,
``%remote use``, the cell's own line.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from . import credentials, targets
from .catalog import Gpu as Gpu
from .catalog import Gpus
from .errors import RequestError
from .errors import did_you_mean as did_you_mean
from .kinds import (
    CONFIRM,
    DATA,
    DURATION,
    ENV,
    FOLDER,
    HINT,
    KERNEL,
    LIMIT,
    MONEY,
    PRICE,
    RECOVER,
    RUN,
    SIZE,
    TARGET,
    Kind,
)
from .kinds import FLAG as FLAG
from .kinds import GPU as GPU
from .kinds import NAME as NAME
from .sources import Source
from .toml_files import Table, tables

CELL = "a cell's %%remote line"
NOTEBOOK = "%remote use"
CONFIG = "configuration files and the environment"
EVERYWHERE = (CELL, NOTEBOOK, CONFIG)

_OTHER_TABLES = ("prices", targets.TABLE)
"""Tables of settings files that are read elsewhere: catalog/prices.py, targets.py."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What to run on, with every setting resolved. Durations in seconds, sizes in bytes."""

    gpu: Gpus | None = None
    on: str = targets.AUTO
    idle: float = 900.0
    time: float | None = None
    machine: str | None = None
    reconnect: float = 600.0
    recover: str = "checkpoint"
    checkpoints: str = ""
    name: str = ""
    detach: bool = False
    background: bool = False
    kernel: str = ""
    isolate: bool = False
    sync: bool = True
    sync_limit: int = 500_000_000
    env: str = "mirror"
    index_credentials: bool = False
    quiet: bool = False
    eager_limit: int = 64_000_000
    data: tuple[Source, ...] = ()
    data_credentials: bool = False
    price: int = 0
    """Micro-USD per hour of a machine of the user's own."""
    hint: float | None = 60.0
    confirm: int | None = 5_000_000
    """Micro-USD per hour above which a launch is asked about; None: nothing is asked."""
    budget: int | None = None
    machine_budget: int | None = None
    notebook_budget: int | None = None
    month_budget: int | None = None
    """Micro-USD that a run, a machine, a notebook's machines and all machines of a month may
    cost."""
    paid: float | None = None
    paid_by: str = ""
    """No settings: how many seconds a machine that is launched is paid for, and by what."""

    @property
    def target(self) -> str:
        """What ``on`` names, or ``auto`` if that has to be found out: what needs no GPU runs
        here."""
        return targets.DEFAULT if self.on == targets.AUTO and self.gpu is None else self.on

    @property
    def place(self) -> tuple[object, ...]:
        """What requests must have in common to be met by one machine."""
        return (self.target, self.gpu, self.machine, self.isolate)


@dataclass(frozen=True)
class Setting:
    """One row of the table. The default is that of the :class:`Request` field, which has the same
    name unless that is a word of Python."""

    name: str
    kind: Kind
    help: str
    example: str
    where: tuple[str, ...] = EVERYWHERE
    field: str = ""

    def of(self, request: Request) -> object:
        """The value in a request."""
        return getattr(request, self.field or self.name)

    @property
    def default(self) -> object:
        return self.of(Request())


SETTINGS: Mapping[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting("gpu", GPU, "accelerator that the cell needs", "gpu=A10:2"),
        Setting(
            "on",
            TARGET,
            "where the machine comes from; auto: the cheapest that has the GPU",
            "on=ssh:box",
        ),
        Setting("idle", DURATION, "stop the machine after so long without work", "idle=15m"),
        Setting("time", LIMIT, "stop the machine so long after its start in any case", "time=2h"),
        Setting(
            "machine",
            NAME,
            "name of the machine, to keep several apart and to share one",
            "machine=big",
            (CELL, NOTEBOOK),
        ),
        Setting(
            "reconnect",
            DURATION,
            "leave a cell to itself when its machine could not be reached for so long",
            "reconnect=10m",
        ),
        Setting(
            "recover",
            RECOVER,
            "after its machine or kernel was lost, begin a cell again: from its checkpoint if it "
            "has one, always, or not",
            "recover=always",
        ),
        Setting(
            "checkpoints",
            FOLDER,
            "bring what the code itself saves in this folder here while the cell goes on",
            "checkpoints=outputs",
        ),
        Setting("name", RUN, "name of this run, to find it again", "name=train", (CELL,)),
        Setting(
            "detach",
            FLAG,
            "do not wait for the cell: %remote attach brings it back, also days later",
            "detach",
            (CELL,),
        ),
        Setting(
            "async",
            FLAG,
            "run in the background: outputs appear here while other cells run",
            "async",
            (CELL,),
            field="background",
        ),
        Setting(
            "kernel",
            KERNEL,
            "new: do not wait for other detached or async runs, use a kernel of its own",
            "kernel=new",
            (CELL,),
        ),
        Setting(
            "isolate",
            FLAG,
            "give a local machine its own environment, folder and store, as a distant one has",
            "isolate",
        ),
        Setting(
            "sync",
            FLAG,
            "keep the notebook's folder and its twin on a distant machine alike",
            "sync=no",
        ),
        Setting(
            "sync_limit",
            SIZE,
            "ask before files of more than this size in all are sent or brought here",
            "sync_limit=2GB",
        ),
        Setting(
            "env",
            ENV,
            "packages on the machine: mirror those in use here, take none but its own, or a file's",
            "env=requirements.txt",
        ),
        Setting(
            "index_credentials",
            FLAG,
            "let the passwords of package indexes that are set here travel to the machine",
            "index_credentials",
            (NOTEBOOK, CONFIG),
        ),
        Setting("quiet", FLAG, "show no run card", "quiet"),
        Setting(
            "eager_limit",
            SIZE,
            "results above this size stay on the machine until they are used here",
            "eager_limit=64MB",
        ),
        Setting(
            "data",
            DATA,
            "datasets that the cell finds by mlinfra_sdk.data(NAME), fetched once by the machine",
            "data=./images,s3://bucket/labels",
        ),
        Setting(
            "data_credentials",
            FLAG,
            "let the machine use this user's own credentials for the URLs of data=",
            "data_credentials",
        ),
        Setting(
            "price",
            PRICE,
            "what an hour of a machine of your own costs in USD (your electricity, your lease)",
            "price=0.12",
            (NOTEBOOK, CONFIG),
        ),
        Setting(
            "confirm",
            CONFIRM,
            "ask before a machine is started that costs more than this in USD per hour",
            "confirm=2",
        ),
        Setting(
            "hint",
            HINT,
            "below a cell that took so long in the notebook's own kernel, say what a GPU may make "
            "of it",
            "hint=5m",
            (NOTEBOOK, CONFIG),
        ),
        Setting("budget", MONEY, "stop a run that has cost so much, in USD", "budget=5"),
        Setting(
            "machine_budget",
            MONEY,
            "stop a machine that has cost so much, in USD",
            "machine_budget=20",
        ),
        Setting(
            "notebook_budget",
            MONEY,
            "what all machines of a notebook may cost in USD",
            "notebook_budget=50",
            (NOTEBOOK, CONFIG),
        ),
        Setting(
            "month_budget",
            MONEY,
            "what all machines of a calendar month may cost in USD, of all notebooks",
            "month_budget=200",
            (NOTEBOOK, CONFIG),
        ),
    )
}


@dataclass(frozen=True)
class Layer:
    """Parsed values that were all set in one place; ``origin`` names the place."""

    origin: str
    values: Mapping[str, object]
    place: str = NOTEBOOK


@dataclass(frozen=True)
class Resolved:
    """A request and, for each setting, where its value came from."""

    request: Request
    origins: Mapping[str, str]

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, value, origin) of every setting, as ``%remote status`` shows them."""
        return [
            (name, setting.kind.show(setting.of(self.request)), self.origins[name])
            for name, setting in SETTINGS.items()
            if setting.where != (CELL,)
        ]


def parse(values: Mapping[str, object], *, place: str, origin: str) -> Layer:
    """Check and parse settings written in ``place`` (:data:`CELL`, :data:`NOTEBOOK` or
    :data:`CONFIG`); ``origin`` says where exactly, for messages and ``%remote status``.

    Values are texts as a user writes them; True, False, None and numbers stand for ``yes``,
    ``no``, ``none`` and their text. Raises :class:`RequestError` naming key, value and what is
    accepted.
    """
    return Layer(
        origin, {key: _parse_one(key, value, place, origin) for key, value in values.items()}, place
    )


def _parse_one(key: str, value: object, place: str, origin: str) -> object:
    setting = SETTINGS.get(key)
    allowed = [name for name, row in SETTINGS.items() if place in row.where]
    if setting is None:
        raise RequestError(
            f"Unknown key {key!r} in {origin}.{did_you_mean(key, allowed)}",
            hint=f"Known keys: {', '.join(allowed)}.",
        )
    if place not in setting.where:
        raise RequestError(
            f"{key!r} cannot be set in {origin}.",
            hint=f"Set it in {' or '.join(setting.where)}.",
        )
    text = _as_text(value)
    if text is not None and setting.kind is TARGET:
        text = credentials.keep_apart(text)
    try:
        if text is None:
            raise ValueError
        return setting.kind.parse(text.strip())
    except ValueError as error:
        shown = text if text is not None else repr(value)
        guess = str(error) if setting.kind in (TARGET, GPU) else ""
        accepts = setting.kind.accepts
        if setting.kind is TARGET:
            accepts = f"{accepts}: {', '.join(targets.names())}"
        raise RequestError(
            f"{key}={shown} in {origin} is not understood.{guess}",
            hint=f"Accepted: {accepts}. Example: {setting.example}",
        ) from None


def _as_text(value: object) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, (int, float)):
        return str(value)
    return None


def resolve(layers: Iterable[Layer]) -> Resolved:
    """Lay the layers over the built-in defaults, the last one on top. Settings of the target that
    they choose lie on what files and environment say, and below the rest."""
    layers = list(layers)
    on = next((it.values["on"] for it in reversed(layers) if "on" in it.values), targets.AUTO)
    above = next((n for n, it in enumerate(layers) if it.place != CONFIG), len(layers))
    layers.insert(above, _target_layer(str(on)))
    values: dict[str, Any] = {}
    origins = dict.fromkeys(SETTINGS, "default")
    for layer in layers:
        values.update({SETTINGS[key].field or key: it for key, it in layer.values.items()})
        origins.update(dict.fromkeys(layer.values, layer.origin))
    return Resolved(Request(**values), origins)


def _target_layer(on: str) -> Layer:
    """What the target's own table says of settings."""
    if on == targets.AUTO:  # the most frequent one, and none that could be found
        return Layer(on, {})
    try:
        target = targets.find(on)
    except ValueError:  # its table was there when on= was parsed
        return Layer(on, {})
    own = {key: value for key, value in target.keys.items() if key in SETTINGS and key != "on"}
    return _parse_table(target.table, own)


def target_options(on: str) -> Mapping[str, object]:
    """What the target's own table says to its provider: all that is no setting."""
    return {key: it for key, it in targets.find(on).keys.items() if key not in SETTINGS}


def configured(directory: Path | None = None) -> list[Layer]:
    """The layers that are not written in the notebook: user file, project, environment.

    ``directory`` is the notebook's (default: the working directory). Files are read again only
    when they changed, so this may be called before every cell.
    """
    layers = []
    for table in tables(directory):
        own = {key: it for key, it in table.values.items() if key not in _OTHER_TABLES}
        layers.append(_parse_table(table, own))
    for name in SETTINGS:
        variable = f"MLINFRA_{name.upper()}"
        text = os.environ.get(variable)
        if text is not None:
            layers.append(
                parse({name: text}, place=CONFIG, origin=f"the environment variable {variable}")
            )
    return layers


def _parse_table(table: Table, values: Mapping[str, object]) -> Layer:
    """The settings among a file's values; messages name the line."""
    parsed: dict[str, object] = {}
    for key, value in values.items():
        origin = table.origin + table.line_of(key)
        parsed.update(parse({key: value}, place=CONFIG, origin=origin).values)
    return Layer(table.origin, parsed, CONFIG)


def describe(place: str) -> str:
    """A plain-text table of the settings that ``place`` accepts: key, default, meaning, example."""
    rows = [
        (setting.name, setting.kind.show(setting.default) or "none", setting.help, setting.example)
        for setting in SETTINGS.values()
        if place in setting.where
    ]
    width = max(len(name) for name, *_ in rows)
    lines = []
    for name, default, text, example in rows:
        lines.append(f"{name:<{width}}  {text}")
        lines.append(f"{'':<{width}}  default {default}; example: {example}")
    return "\n".join(lines)
