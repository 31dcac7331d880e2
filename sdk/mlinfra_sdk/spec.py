"""What a user asks for: the settings, their values, and where each value came from.

:data:`SETTINGS` is the one table of everything that can be set. Parsing, completion, help and
``%remote status`` are derived from it, so a new setting is one new row and one field of
:class:`Request`.

Values come in layers, each overriding the one before: built-in, the user's ``config.toml``,
``[tool.mlinfra]`` of the nearest ``pyproject.toml``, ``MLINFRA_*`` environment variables,
``%remote use``, the cell's own line.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import msgspec

from . import paths, units
from .catalog import Gpu as Gpu
from .catalog import Gpus, catalog, parse_gpus
from .errors import RequestError
from .errors import did_you_mean as did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CELL = "a cell's %%remote line"
NOTEBOOK = "%remote use"
CONFIG = "configuration files and the environment"
EVERYWHERE = (CELL, NOTEBOOK, CONFIG)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What to run on, with every setting resolved. Durations in seconds, sizes in bytes."""

    gpu: Gpus | None = None
    on: str = "local"
    idle: float = 900.0
    time: float | None = None
    machine: str | None = None
    reconnect: float = 600.0
    name: str = ""
    detach: bool = False
    background: bool = False
    kernel: str = ""
    isolate: bool = False
    quiet: bool = False
    eager_limit: int = 64_000_000
    price: int = 0
    """Micro-USD per hour of the local machine."""

    @property
    def place(self) -> tuple[object, ...]:
        """What requests must have in common to be met by one machine."""
        return (self.on, self.gpu, self.machine, self.isolate)


@dataclass(frozen=True)
class Kind:
    """A kind of value: how it is read, shown, described and completed."""

    accepts: str
    parse: Callable[[str], object]
    show: Callable[[Any], str]
    suggestions: Callable[[], Iterable[str]]


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


def targets() -> tuple[str, ...]:
    """Names that ``on=`` accepts: the installed providers."""
    return _targets()


@functools.cache
def _targets() -> tuple[str, ...]:
    found = {entry.name for entry in entry_points(group="mlinfra.providers")}
    return tuple(sorted(found | {Request().on}))


def _parse_target(text: str) -> str:
    if text not in targets():
        raise ValueError(did_you_mean(text, targets()))
    return text


def _parse_span(text: str) -> float:
    seconds = units.parse_duration(text)
    if seconds <= 0:
        raise ValueError(text)
    return seconds


def _parse_name(text: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", text) is None:
        raise ValueError(text)
    return text


def _parse_kernel(text: str) -> str:
    if text != "new":
        raise ValueError(text)
    return text


_BOOLEANS = {"yes": True, "true": True, "on": True, "1": True} | {
    "no": False,
    "false": False,
    "off": False,
    "0": False,
}


def _parse_flag(text: str) -> bool:
    try:
        return _BOOLEANS[text.lower()]
    except KeyError:
        raise ValueError(text) from None


def _none_or(show: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: "none" if value is None else show(value)


GPU = Kind(
    "a GPU name such as A10, with a count as in A10:2, memory such as 24GB, alternatives as in "
    "A10|L4, any, or none",
    parse_gpus,
    _none_or(str),
    lambda: (*catalog().names, "any", "none"),
)
TARGET = Kind("one of the installed providers", _parse_target, str, targets)
DURATION = Kind(
    "a duration with units, such as 15m, 2h, 1h30m or 90s",
    _parse_span,
    units.format_duration,
    lambda: ("15m", "30m", "1h", "2h"),
)
LIMIT = Kind(
    DURATION.accepts + ", or none",
    lambda text: None if text.lower() == "none" else _parse_span(text),
    _none_or(units.format_duration),
    lambda: ("30m", "1h", "2h", "8h", "none"),
)
SIZE = Kind(
    "a size with a unit, such as 64MB or 2GiB",
    units.parse_size,
    units.format_size,
    lambda: ("16MB", "64MB", "256MB", "1GB"),
)
NAME = Kind(
    "a name of letters, digits, dots, dashes and underscores, beginning with a letter or digit",
    _parse_name,
    _none_or(str),
    tuple,
)
RUN = Kind(NAME.accepts, _parse_name, str, tuple)
KERNEL = Kind("new", _parse_kernel, str, lambda: ("new",))
FLAG = Kind("yes or no", _parse_flag, lambda value: "yes" if value else "no", lambda: ("yes", "no"))
PRICE = Kind(
    "an amount in USD per hour, such as 0.35",
    units.parse_usd,
    lambda value: f"{value / units.MICRO:g}",
    tuple,
)

SETTINGS: Mapping[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting("gpu", GPU, "accelerator that the cell needs", "gpu=A10:2"),
        Setting("on", TARGET, "provider that the machine comes from", "on=local"),
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
        Setting("quiet", FLAG, "show no run card", "quiet"),
        Setting(
            "eager_limit",
            SIZE,
            "results above this size stay on the machine until they are used here",
            "eager_limit=64MB",
        ),
        Setting(
            "price",
            PRICE,
            "what an hour of the local machine costs in USD (your electricity, your lease)",
            "price=0.12",
            (NOTEBOOK, CONFIG),
        ),
    )
}


@dataclass(frozen=True)
class Layer:
    """Parsed values that were all set in one place; ``origin`` names the place."""

    origin: str
    values: Mapping[str, object]


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
        origin, {key: _parse_one(key, value, place, origin) for key, value in values.items()}
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
    try:
        if text is None:
            raise ValueError
        return setting.kind.parse(text.strip())
    except ValueError as error:
        shown = text if text is not None else repr(value)
        guess = str(error) if setting.kind in (TARGET, GPU) else ""
        accepts = setting.kind.accepts
        if setting.kind is TARGET:
            accepts = f"{accepts}: {', '.join(targets())}"
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
    """Lay the layers over the built-in defaults, the last one on top."""
    values: dict[str, Any] = {}
    origins = dict.fromkeys(SETTINGS, "default")
    for layer in layers:
        values.update({SETTINGS[key].field or key: it for key, it in layer.values.items()})
        origins.update(dict.fromkeys(layer.values, layer.origin))
    return Resolved(Request(**values), origins)


def configured(directory: Path | None = None) -> list[Layer]:
    """The layers that are not written in the notebook: user file, project, environment.

    ``directory`` is the notebook's (default: the working directory). Files are read again only
    when they changed, so this may be called before every cell.
    """
    layers = [_file_layer(str(paths.config_file()), None)]
    project = _nearest_pyproject(directory or Path.cwd())
    if project is not None:
        layers.append(_file_layer(project, "mlinfra"))
    for name in SETTINGS:
        variable = f"MLINFRA_{name.upper()}"
        text = os.environ.get(variable)
        if text is not None:
            layers.append(
                parse({name: text}, place=CONFIG, origin=f"the environment variable {variable}")
            )
    return layers


def _nearest_pyproject(directory: Path) -> str | None:
    folder = os.path.abspath(directory)
    while True:
        candidate = os.path.join(folder, "pyproject.toml")
        if os.path.isfile(candidate):
            return candidate
        parent = os.path.dirname(folder)
        if parent == folder:
            return None
        folder = parent


def _file_layer(path: str, tool: str | None) -> Layer:
    try:
        info = os.stat(path)
    except OSError:
        return Layer(path, {})
    return _read_file(path, tool, info.st_mtime_ns, info.st_size)


@functools.lru_cache(maxsize=16)
def _read_file(path: str, tool: str | None, _mtime: int, _size: int) -> Layer:
    try:
        text = Path(path).read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RequestError(
            f"The settings file {path} is not valid TOML: {error}.",
            hint='Mend that line; texts and units need quotes, as in idle = "15m".',
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"The settings file {path} cannot be read: {error}.",
            hint="Mend its permissions or its encoding (UTF-8), or move it away.",
        ) from None
    origin = path
    if tool is not None:
        tools = table.get("tool")
        table = tools.get(tool, {}) if isinstance(tools, dict) else {}
        origin = f"{path} [tool.{tool}]"
        if not isinstance(table, dict):
            raise RequestError(
                f"{origin} is not a table.", hint=f"Write [tool.{tool}] and the keys below it."
            )
    else:
        table.pop("prices", None)  # catalog/prices.py reads these
    values: dict[str, object] = {}
    for key, value in table.items():
        where = _line_of(text, key, f"[tool.{tool}]" if tool else None)
        values.update(parse({key: value}, place=CONFIG, origin=origin + where).values)
    return Layer(origin, values)


def _line_of(text: str, key: str, header: str | None) -> str:
    """``, line N`` of a key below a table header, or nothing when it is written unusually."""
    pattern = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=")
    inside = header is None
    for number, line in enumerate(text.splitlines(), start=1):
        if inside and pattern.match(line):
            return f", line {number}"
        inside = inside or line.strip() == header
    return ""


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
