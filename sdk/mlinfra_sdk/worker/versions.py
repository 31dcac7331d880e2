"""The versions that must fit for objects to travel, and the platform that packages must fit."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import version

from mlinfra_sdk._version import __version__
from mlinfra_sdk.worker.recipe import Platform


@functools.cache
def versions() -> dict[str, str]:
    """Those of this process."""
    return {
        "Python": platform.python_version(),
        "cloudpickle": version("cloudpickle"),
        "mlinfra-sdk": __version__,
    }


@functools.cache
def platform_here() -> Platform:
    """That of this process."""
    from packaging.markers import default_environment
    from packaging.tags import platform_tags

    markers = {key: str(value) for key, value in default_environment().items()}
    return Platform(markers, list(platform_tags()), _cuda())


def _cuda() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ""
    try:
        version = pynvml.nvmlSystemGetCudaDriverVersion()
        has_gpu = pynvml.nvmlDeviceGetCount() > 0
    except pynvml.NVMLError:
        return ""
    finally:
        pynvml.nvmlShutdown()
    return f"{version // 1000}.{version % 1000 // 10}" if has_gpu else ""
