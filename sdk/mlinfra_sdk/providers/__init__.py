"""Where machines come from: one file a backend, found by the entry points `mlinfra.providers`."""

from __future__ import annotations

from importlib.metadata import entry_points

from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.providers.base import Provider


def load(name: str) -> Provider:
    """The provider of this name; only this one's module is imported."""
    if name == "local":  # also when the package runs from a source tree
        from mlinfra_sdk.providers.local import LocalProvider

        return LocalProvider()
    for entry in entry_points(group="mlinfra.providers"):
        if entry.name == name:
            provider: Provider = entry.load()()
            return provider
    raise RequestError(f"There is no provider {name!r}.", hint="`mlinfra doctor` lists them.")
