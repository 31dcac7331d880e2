"""Where machines come from: one file a backend, found by the entry points `mlinfra.providers`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points

import msgspec

from mlinfra_sdk import spec, targets
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.providers.base import Handle, Provider


def load(on: str) -> Provider:
    """The provider that ``on=`` names, with the options of its target; only its module is
    imported. Raises :class:`RequestError`."""
    try:
        target = targets.find(on)
    except ValueError as proposal:
        raise RequestError(
            f"There is no target {on!r}.{proposal}",
            hint=f"on= takes {', '.join(targets.names())}.",
        ) from None
    options = dict(spec.target_options(on))
    kind = _kind(target.provider)
    if target.argument:
        if not kind.argument:
            raise RequestError(
                f"on={target.provider} takes nothing behind a colon, but on={on} was written.",
                hint=f"Write on={target.provider}.",
            )
        options[kind.argument] = target.argument
    return kind(_options(kind, options, target.table.origin or f"on={on}"))


def of(handle: Handle) -> Provider:
    """The provider of a machine that exists, whatever the settings say now."""
    return _kind(handle.provider)()


def _kind(name: str) -> type[Provider]:
    if name == targets.DEFAULT:  # also when the package runs from a source tree
        from mlinfra_sdk.providers.local import LocalProvider

        return LocalProvider
    for entry in entry_points(group="mlinfra.providers"):
        if entry.name == name:
            kind: type[Provider] = entry.load()
            return kind
    raise RequestError(f"There is no provider {name!r}.", hint="`mlinfra doctor` lists them.")


def _options(kind: type[Provider], values: Mapping[str, object], origin: str) -> msgspec.Struct:
    try:
        return msgspec.convert(dict(values), kind.options, strict=False)
    except msgspec.ValidationError as error:
        known = [field.name for field in msgspec.structs.fields(kind.options)]
        raise RequestError(
            f"The options of {kind.name} in {origin} are not understood: {error}.",
            hint=f"Options: {', '.join(known)}." if known else f"{kind.name} has no options.",
        ) from None
