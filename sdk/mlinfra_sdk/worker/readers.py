"""Packages that open the URLs of ``data=``, installed on the machine when the first one comes.

They do not belong into the environments of kernels, which need not read these URLs, nor into the
agent's own, which is shared and never changes: each kind of URL has a folder of packages of its
own, for all machines of this user on this host, which only the fetching process sees.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import requires
from pathlib import Path
from urllib.parse import urlsplit

from blake3 import blake3
from packaging.requirements import Requirement

from mlinfra_sdk.errors import EnvironmentFailed, RequestError
from mlinfra_sdk.sources import EXTRAS
from mlinfra_sdk.worker.uv import run_uv

_STANDARD = ("http", "https")
"""What the standard library opens."""


def _requirements(extra: str) -> list[str]:
    """What this extra of the SDK adds."""
    found = []
    for line in requires("mlinfra-sdk") or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            requirement.marker = None
            found.append(str(requirement))
    return sorted(found)


async def packages_for(url: str, cache: Path) -> Path | None:
    """The folder with what opens a URL, below ``cache``; None if that is here anyway. Raises
    :class:`RequestError` where it cannot be had."""
    scheme = urlsplit(url).scheme
    extra, package = EXTRAS[scheme]
    if scheme in _STANDARD or importlib.util.find_spec(package) is not None:
        return None
    requirements = _requirements(extra)
    recipe = repr((sys.version_info[:2], requirements)).encode()
    folder = cache / f"{extra}-{blake3(recipe).hexdigest()[:16]}"
    try:
        if not folder.exists():
            await _install(requirements, folder)
    except (EnvironmentFailed, OSError) as error:
        raise RequestError(
            f"{scheme}:// needs the package {package} on the machine, which cannot be had there:"
            f" {error}",
            hint=f"Install it there: pip install mlinfra-sdk[{extra}].",
        ) from None
    return folder


async def _install(requirements: list[str], folder: Path) -> None:
    """Make the folder, as a whole or not at all."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _temporary(folder.parent) as temporary:
        target = ["--python", sys.executable, "--target", str(temporary / "packages")]
        await run_uv(
            ["pip", "install", *target, *requirements],
            folder=temporary,
            tell=lambda line: None,
        )
        with suppress(OSError):  # another agent was faster
            (temporary / "packages").rename(folder)
        if not folder.exists():
            raise EnvironmentFailed("The packages could not be put in place.")


@contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    """A folder that goes in the end; those of agents that were killed go before."""
    for old in parent.glob(".unfinished-*"):
        _remove_abandoned(old)
    folder = parent / f".unfinished-{secrets.token_hex(8)}"
    folder.mkdir(mode=0o700)
    use = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(use, fcntl.LOCK_SH)
        yield folder
    finally:
        os.close(use)
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    with suppress(OSError):
        use = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(use)
