"""Kinds of values that settings have: how each is read, shown, described and completed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from . import sources, targets, units
from .catalog import catalog, parse_gpus


@dataclass(frozen=True)
class Kind:
    """A kind of value: how it is read, shown, described and completed."""

    accepts: str
    parse: Callable[[str], object]
    show: Callable[[Any], str]
    suggestions: Callable[[], Iterable[str]]


def _parse_target(text: str) -> str:
    if text != targets.AUTO:
        targets.find(text)
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


def _parse_env(text: str) -> str:
    if not text:
        raise ValueError(text)
    return text.lower() if text.lower() in ("mirror", "none") else text


def _environments() -> Iterable[str]:
    known = ("requirements.txt", "pyproject.toml", "uv.lock", "environment.yml")
    return ("mirror", "none", *(name for name in known if os.path.isfile(name)))


_RECOVER = ("checkpoint", "always", "no")


def _parse_recover(text: str) -> str:
    if text.lower() not in _RECOVER:
        raise ValueError(text)
    return text.lower()


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


_CONFIRM = {"no": None, "off": None, "false": None, "yes": 0, "on": 0, "true": 0}


def _parse_amount(text: str) -> int:
    micro = units.parse_usd(text)
    if not micro:
        raise ValueError(text)
    return micro


def _none_or(show: Callable[[Any], str]) -> Callable[[Any], str]:
    return lambda value: "none" if value is None else show(value)


def _parse_folder(text: str) -> str:
    if text.lower() == "none":
        return ""
    path = PurePosixPath(text.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts or text.startswith("~"):
        raise ValueError(text)
    return str(path)


def _folders() -> tuple[str, ...]:
    return tuple(sorted(it.name for it in Path().iterdir() if it.is_dir() and it.name[0] != "."))


GPU = Kind(
    "a GPU name such as A10, with a count as in A10:2, memory such as 24GB, alternatives as in "
    "A10|L4, any, or none",
    parse_gpus,
    _none_or(str),
    lambda: (*catalog().names, "any", "none"),
)
TARGET = Kind(
    "auto, an installed provider, with its argument as in ssh:HOST, or a target of a settings file",
    _parse_target,
    str,
    lambda: (targets.AUTO, *targets.names()),
)
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
HINT = Kind(
    DURATION.accepts + ", or no",
    lambda text: None if text.lower() == "no" else _parse_span(text),
    lambda value: "no" if value is None else units.format_duration(value),
    lambda: ("1m", "5m", "no"),
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
ENV = Kind(
    "mirror, none, or the path of a requirements.txt, pyproject.toml, uv.lock or environment.yml",
    _parse_env,
    str,
    _environments,
)
RECOVER = Kind("checkpoint, always or no", _parse_recover, str, lambda: _RECOVER)
KERNEL = Kind("new", _parse_kernel, str, lambda: ("new",))
FOLDER = Kind(
    "a folder below the notebook's, such as outputs, or none",
    _parse_folder,
    lambda value: value or "none",
    _folders,
)
FLAG = Kind("yes or no", _parse_flag, lambda value: "yes" if value else "no", lambda: ("yes", "no"))
PRICE = Kind(
    "an amount in USD per hour, such as 0.35",
    units.parse_usd,
    lambda value: f"{value / units.MICRO:g}",
    tuple,
)
MONEY = Kind(
    "an amount in USD, such as 5 or 0.50, or none",
    lambda text: None if text.lower() == "none" else _parse_amount(text),
    _none_or(lambda value: f"{value / units.MICRO:g}"),
    lambda: ("none",),
)
CONFIRM = Kind(
    "an amount in USD per hour, yes (ask always) or no (never)",
    lambda text: _CONFIRM[text.lower()] if text.lower() in _CONFIRM else units.parse_usd(text),
    lambda value: "no" if value is None else f"{value / units.MICRO:g}",
    lambda: ("no", "yes", "2", "10"),
)

DATA = Kind(
    "folders here and URLs (s3://, gs://, hf://, https://) with commas between them, each also as "
    "NAME=LOCATION",
    sources.parse,
    sources.show,
    lambda: ("./data", "s3://bucket/path", "https://host/file"),
)
