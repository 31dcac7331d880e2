"""The versions that must fit for objects to travel."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import version

from mlinfra_sdk._version import __version__


@functools.cache
def versions() -> dict[str, str]:
    """Those of this process."""
    return {
        "Python": platform.python_version(),
        "cloudpickle": version("cloudpickle"),
        "mlinfra-sdk": __version__,
    }
