"""The words of ``%%remote`` and ``%remote``: what a line means, and the help that describes it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mlinfra_sdk import spec, targets, units
from mlinfra_sdk.catalog import catalog
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.ledger.report import GROUPS
from mlinfra_sdk.machines.ends import EXTENSION
from mlinfra_sdk.spec import CELL, NOTEBOOK, SETTINGS, Layer

CELL_ORIGIN = "the %%remote line"
USE_ORIGIN = "%remote use"
QUOTE_ORIGIN = "%remote quote"


@dataclass(frozen=True)
class Subcommand:
    """One ``%remote`` subcommand: how it is written and what it does."""

    usage: str
    help: str


SUBCOMMANDS: Mapping[str, Subcommand] = {
    "status": Subcommand("status", "this notebook's machine and every setting with its origin"),
    "use": Subcommand(
        "use [KEY=VALUE ...]",
        "set this notebook's defaults; KEY= takes one back; alone shows them",
    ),
    "machines": Subcommand("machines", "machines of yours that run, with their cost so far"),
    "stop": Subcommand("stop [MACHINE]", "stop this notebook's machine, or the one named"),
    "extend": Subcommand(
        "extend [MACHINE] [DURATION]", "keep a machine for 30m more though it is idle"
    ),
    "restart": Subcommand("restart", "give this notebook a fresh remote kernel on its machine"),
    "pull": Subcommand("pull NAME ...", "fetch variables that stayed on the machine"),
    "sync": Subcommand(
        "sync [--dry-run] [--delete] [PATH ...]",
        "bring this folder and the machine's up to date now, and fetch large files by name",
    ),
    "runs": Subcommand("runs", "runs that go on, wait, or have ended and not been collected"),
    "attach": Subcommand(
        "attach [RUN]", "bring a run back: its outputs, live from there on, and its variables"
    ),
    "logs": Subcommand("logs RUN [-f]", "show what a run has printed; -f: and what it will"),
    "wait": Subcommand("wait RUN", "wait for the end of a run, without collecting it"),
    "catalog": Subcommand(
        "catalog [GPU] [--refresh]", "GPUs and their prices; --refresh: first ask your providers"
    ),
    "cost": Subcommand(
        "cost [GROUP]", "what was spent in 30 days by day, notebook, machine, provider or run"
    ),
    "quote": Subcommand(
        "quote [KEY=VALUE ...]",
        "what a machine would cost, such as gpu=A10, wherever it is to be had",
    ),
    "checkpoints": Subcommand(
        "checkpoints [NAME]", "checkpoints of training runs that are safe here, and their sizes"
    ),
    "cancel": Subcommand("cancel RUN", "interrupt a run, or take it out of the queue"),
}


SYNC_OPTIONS = ("--dry-run", "--delete")


@dataclass(frozen=True)
class Command:
    """A parsed ``%remote`` line. ``settings`` are those of ``use`` and ``quote``, ``unset`` of
    ``use``."""

    name: str
    arguments: tuple[str, ...] = ()
    settings: Layer = field(default_factory=lambda: Layer(USE_ORIGIN, {}))
    unset: tuple[str, ...] = ()


def parse_cell(line: str) -> Layer:
    """The settings written on a ``%%remote`` line."""
    pairs = _pairs(_words(line, CELL_ORIGIN), CELL, CELL_ORIGIN)
    return spec.parse(pairs, place=CELL, origin=CELL_ORIGIN)


def pairs_of(line: str, origin: str, own: tuple[str, ...] = ()) -> dict[str, str]:
    """The words of another magic's line, which has keys of its own beside the settings."""
    words = _words(line, origin)
    mine = [word for word in words if word.partition("=")[0] in own and "=" in word]
    found = _pairs([word for word in words if word not in mine], NOTEBOOK, origin)
    return found | dict(word.split("=", 1) for word in mine)


def parse_command(line: str) -> Command:
    """A ``%remote`` line; without a subcommand it is ``status``."""
    words = _words(line, "the %remote line") or ["status"]
    name, arguments = words[0], words[1:]
    if name not in SUBCOMMANDS:
        guess = spec.did_you_mean(name, SUBCOMMANDS)
        if not guess and "=" in name:
            guess = f" To set defaults write: %remote use {' '.join(words)}."
        raise RequestError(
            f"%remote has no subcommand {name!r}.{guess}",
            hint=f"Subcommands: {', '.join(SUBCOMMANDS)}.",
        )
    if name == "quote":
        pairs = _pairs(arguments, NOTEBOOK, QUOTE_ORIGIN)
        return Command(name, settings=spec.parse(pairs, place=NOTEBOOK, origin=QUOTE_ORIGIN))
    if name == "use":
        pairs = _pairs(arguments, NOTEBOOK, USE_ORIGIN)
        unset = tuple(key for key, value in pairs.items() if not value and key in SETTINGS)
        given = {key: value for key, value in pairs.items() if key not in unset}
        settings = spec.parse(given, place=NOTEBOOK, origin=USE_ORIGIN)
        return Command(name, settings=settings, unset=unset)
    _check_arguments(name, arguments)
    return Command(name, tuple(arguments))


def _check_arguments(name: str, arguments: list[str]) -> None:
    one = dict.fromkeys(("stop", "attach", "wait", "cancel", "cost", "checkpoints"), 1)
    any_number = dict.fromkeys(("pull", "sync"), len(arguments))
    most = {**one, **any_number, "logs": 2, "catalog": 2, "extend": 2}
    least = 1 if name in ("pull", "logs", "wait", "cancel") else 0
    usage = f"Write: %remote {SUBCOMMANDS[name].usage}"
    taken = most.get(name, 0)
    if name == "logs" and len(arguments) == 2 and arguments[1] != "-f":
        taken = 1
    if len(arguments) > taken:
        raise RequestError(
            f"%remote {name} does not take {' '.join(arguments[taken:])!r}.", hint=usage
        )
    if len(arguments) < least:
        what = "variable" if name == "pull" else "run"
        raise RequestError(f"%remote {name} needs the name of a {what}.", hint=usage)
    if name == "extend":
        extension(arguments)
    for argument in arguments:
        if name == "sync" and argument.startswith("-") and argument not in SYNC_OPTIONS:
            raise RequestError(f"%remote sync does not know {argument!r}.", hint=usage)
        if name == "pull" and not argument.isidentifier():
            raise RequestError(f"%remote pull: {argument!r} is not a variable name.", hint=usage)
        if name == "cost" and argument not in GROUPS:
            guess = spec.did_you_mean(argument, GROUPS)
            raise RequestError(f"%remote cost: {argument!r} is not understood.{guess}", hint=usage)


def extension(words: Sequence[str]) -> tuple[str, float]:
    """The machine that ``%remote extend`` names (empty: this notebook's), and seconds."""
    name, seconds = "", EXTENSION
    for word in words:
        try:
            seconds = units.parse_duration(word)
        except ValueError:
            if name:
                raise RequestError(
                    f"%remote extend: {word!r} is no duration.", hint="Write %remote extend 30m"
                ) from None
            name = word
    return name, seconds


def _words(line: str, origin: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise RequestError(
            f"{line.strip()!r} in {origin} cannot be read: {str(error).lower()}.",
            hint="Close the quotes, or leave them out.",
        ) from None


def _pairs(words: list[str], place: str, origin: str) -> dict[str, str]:
    """Words ``key=value`` and bare flags as a mapping of texts."""
    pairs: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            value = _bare(word, words, place, origin)
        elif key.startswith("-") or not key:
            raise _malformed(word, origin, word.lstrip("-") if key else "KEY=VALUE")
        if key in pairs:
            raise RequestError(
                f"{key!r} is given twice in {origin}.", hint="Keep one of the two values."
            )
        pairs[key] = value
    return pairs


def _bare(word: str, words: list[str], place: str, origin: str) -> str:
    setting = SETTINGS.get(word)
    if setting is not None and setting.kind is spec.FLAG:
        return "yes"
    if setting is not None:
        raise RequestError(
            f"{word!r} in {origin} has no value.",
            hint=f"Write {_written_with_spaces(words) or setting.example}, without spaces.",
        )
    if word in targets.names():
        raise _malformed(word, origin, f"on={word}")
    if catalog().canonical(word.partition(":")[0]) is not None:
        raise _malformed(word, origin, f"gpu={word}")
    name = word.lstrip("-")
    if name in SETTINGS and SETTINGS[name].kind is not spec.FLAG:
        raise _malformed(word, origin, SETTINGS[name].example)
    spec.parse({name: "yes"}, place=place, origin=origin)
    raise _malformed(word, origin, name)


def _written_with_spaces(words: list[str]) -> str:
    """``gpu=A10`` for the words ``gpu = A10`` (also ``gpu =A10``, ``gpu= A10`` and ``gpu A10``)."""
    for position, word in enumerate(words):
        joined = "".join(words[position : position + 3])
        following = words[position + 1 : position + 2]
        if word not in SETTINGS or not following:
            continue
        if following[0].startswith("="):
            return joined if following == ["="] else word + following[0]
        if "=" not in following[0] and following[0] not in SETTINGS:
            return f"{word}={following[0]}"
    return ""


def _malformed(word: str, origin: str, proposal: str) -> RequestError:
    return RequestError(f"{word!r} in {origin} is not key=value.", hint=f"Write {proposal}")


CELL_HELP = f"""Run this cell on a remote machine, as if it ran here.

    %%remote [KEY=VALUE ...]

Variables that the cell uses travel there, what it changes comes back, and its outputs appear
below the cell. Without keys it runs with this notebook's defaults (see %remote status).

{spec.describe(CELL)}

Example:

    %%remote gpu=A10 idle=30m
    model.fit(X, y)
"""


def _line_help() -> str:
    width = max(len(sub.usage) for sub in SUBCOMMANDS.values())
    rows = "\n".join(
        f"    %remote {sub.usage:<{width}}  {sub.help}" for sub in SUBCOMMANDS.values()
    )
    return f"""Look after the machines behind %%remote.

{rows}

Keys of %remote use:

{spec.describe(NOTEBOOK)}
"""


LINE_HELP = _line_help()
