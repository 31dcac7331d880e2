"""What ``on=`` may name: a provider (``local``), one with its argument (``ssh:box``), or a target
of the user's own from a settings file::

    [targets.box]
    provider = "ssh"
    host = "me@gpu1.example.org"
    idle = "1h"

A target's keys are the provider's own options and defaults of settings for this target.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

from .errors import RequestError, did_you_mean
from .toml_files import Table, tables

TABLE = "targets"
DEFAULT = "local"
AUTO = "auto"
"""No target, but the wish that one be chosen."""
_PROVIDER = "provider"


@dataclass(frozen=True)
class Target:
    """A target by its ``name``, which is what ``on=`` says. ``argument`` is what stands behind the
    colon; ``table`` holds the other keys of a target from a settings file."""

    name: str
    provider: str
    argument: str = ""
    table: Table = field(default_factory=lambda: Table("", {}))

    @property
    def keys(self) -> Mapping[str, object]:
        """Options and settings, not told apart."""
        return {key: value for key, value in self.table.values.items() if key != _PROVIDER}


@functools.cache
def installed() -> tuple[str, ...]:
    """The names of the installed providers."""
    found = {entry.name for entry in entry_points(group="mlinfra.providers")}
    return tuple(sorted(found | {DEFAULT}))


def configured(directory: Path | None = None) -> dict[str, Target]:
    """The targets of the settings files, by name. Raises :class:`RequestError`."""
    found = {}
    for source in tables(directory):
        for name, table in source.below(TABLE):
            provider = table.values.get(_PROVIDER, name)
            if provider not in installed():
                raise RequestError(
                    f"{_PROVIDER} = {provider!r} in {table.origin} is no installed provider."
                    f"{did_you_mean(str(provider), installed())}",
                    hint=f"Installed: {', '.join(installed())}.",
                )
            found[name] = Target(name, str(provider), table=table)
    return found


def names() -> tuple[str, ...]:
    """What ``on=`` can say without an argument."""
    return tuple(dict.fromkeys((*configured(), *installed())))


def find(name: str) -> Target:
    """The target that ``on=`` names. ValueError, with a proposal if there is one."""
    own = configured().get(name)
    if own is not None:
        return own
    provider, colon, argument = name.partition(":")
    if provider not in installed():
        installed.cache_clear()  # it may have been installed since
    if provider not in installed() or (colon and not argument):
        raise ValueError(did_you_mean(name, names()))
    return Target(name, provider, argument)
