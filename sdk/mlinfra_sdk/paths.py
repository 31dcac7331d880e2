"""Where this user's files lie."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import platformdirs

from .errors import StateError

APP = "mlinfra"


def data_dir() -> Path:
    """The directory of the ledger and other state: ``$MLINFRA_HOME`` or the platform's own place.

    It is created with mode 0700, because what lies there belongs to this user alone.
    """
    override = os.environ.get("MLINFRA_HOME")
    path = Path(override) if override else platformdirs.user_data_path(APP, appauthor=False)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(
            f"The state directory {path} cannot be made: {error.strerror}.",
            hint="Set MLINFRA_HOME to a directory that you can write to.",
        ) from None
    return path


def cache_dir() -> Path:
    """The directory of what can be made again, shared by all machines of this user on this host:
    below ``$MLINFRA_HOME`` if that is set, else the platform's own place."""
    if os.environ.get("MLINFRA_HOME"):
        path = data_dir() / "cache"
    else:
        path = platformdirs.user_cache_path(APP, appauthor=False)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


@functools.lru_cache(maxsize=1)
def config_file() -> Path:
    """The user's own settings file; it need not exist."""
    return platformdirs.user_config_path(APP, appauthor=False) / "config.toml"
