"""Whether everything works here, and how to mend what does not: ``mlinfra doctor``."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata

import msgspec

from mlinfra_sdk import paths, providers, spec, targets
from mlinfra_sdk._version import __version__
from mlinfra_sdk.catalog import describe_devices
from mlinfra_sdk.errors import MlinfraError
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.spec import Request


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at. ``mend`` says what to do about a problem; an ``optional`` one
    is that of a provider which nothing in the settings speaks of."""

    name: str
    ok: bool
    detail: str
    mend: str = ""
    optional: bool = False


class _Problem(Exception):
    def __init__(self, detail: str, mend: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.mend = mend


def checks() -> Iterator[Check]:
    """Looks at one thing after the other; the last takes a few seconds."""
    for name, function, mend in (
        ("Python", _python, "Install Python 3.10 or newer."),
        ("packages", _packages, "Run: pip install --upgrade mlinfra-sdk"),
        ("settings", _settings, "Mend the setting."),
        ("state directory", _state, "Make it writable, or set MLINFRA_HOME to another folder."),
        ("ledger", _ledger, "Move the file away; a new one is made."),
        ("chunk store", _store, "Free some space, or remove the folder: it is only a cache."),
        ("unix sockets", _sockets, "Set TMPDIR to a folder with a short path, such as /tmp."),
        ("GPU", _gpu, "Reinstall the NVIDIA driver."),
    ):
        yield _checked(name, function, mend)
    for target in targets.names():
        yield from provider_checks(target)
    yield _checked("round trip", _round_trip, "The error above says what failed.")


def _checked(name: str, function: Callable[[], str], mend: str) -> Check:
    try:
        return Check(name, True, function())
    except _Problem as problem:
        return Check(name, False, problem.detail, problem.mend)
    except MlinfraError as error:
        return Check(name, False, error.message, error.hint or mend)
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}", mend)


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()} at {sys.executable}"


def _packages() -> str:
    """Our own requirements, and that both of our distributions are of one version."""
    from packaging.requirements import Requirement

    for text in metadata.requires("mlinfra-sdk") or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            raise _Problem(
                f"{wanted.name} is not installed.", f'Run: pip install "{wanted}"'
            ) from None
        if not wanted.specifier.contains(found, prereleases=True):
            raise _Problem(
                f"{wanted.name} {found} is installed, but {wanted.specifier} is needed.",
                f'Run: pip install "{wanted}"',
            )
    shown = [f"mlinfra-sdk {__version__}"]
    with contextlib.suppress(metadata.PackageNotFoundError):
        extension = metadata.version("jupyter-mlinfra")
        if extension != __version__:
            raise _Problem(
                f"jupyter-mlinfra {extension} and mlinfra-sdk {__version__} differ.",
                f'Run: pip install "jupyter-mlinfra=={__version__}"',
            )
        shown.append(f"jupyter-mlinfra {extension}")
    for name in ("ipykernel", "jupyter-client", "cloudpickle"):
        shown.append(f"{name} {metadata.version(name)}")
    return ", ".join(shown)


def _settings() -> str:
    rows = spec.resolve(spec.configured()).rows()
    changed = [f"{name}={value} ({origin})" for name, value, origin in rows if origin != "default"]
    return ", ".join(changed) or "all at their defaults"


def _state() -> str:
    folder = paths.data_dir()
    info = folder.stat()
    if info.st_uid != os.getuid():
        raise _Problem(f"{folder} belongs to another user.", f"Run: sudo chown $USER '{folder}'")
    if stat.S_IMODE(info.st_mode) & 0o077:
        raise _Problem(f"{folder} can be read by other users.", f"Run: chmod 700 '{folder}'")
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
    free = os.statvfs(folder)
    return f"{folder}, {free.f_bavail * free.f_frsize / 1e9:.1f} GB free"


def _ledger() -> str:
    ledger = Ledger.open()
    try:
        running = len(ledger.machines(active=True))
        mode = stat.S_IMODE(ledger.path.stat().st_mode)
        if mode & 0o077:
            raise _Problem(
                f"{ledger.path} can be read by other users.", f"Run: chmod 600 '{ledger.path}'"
            )
        return f"{ledger.path}, {running} machine{'s' * (running != 1)} open"
    finally:
        ledger.close()


def _store() -> str:
    store = ChunkStore(paths.data_dir() / "store")
    data = os.urandom(100)
    if store.read_chunk(store.put_chunk(data)) != data:
        raise _Problem("What was written is read back otherwise.", "Check the disk.")
    return str(store.root)


def _sockets() -> str:
    """Kernels listen on sockets in the folder for temporary files."""
    with tempfile.TemporaryDirectory(prefix="mlinfra-") as folder:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"{folder}/k-1")
        return f"work in {os.path.dirname(folder)}"


def _gpu() -> str:
    from mlinfra_sdk.worker import gpus

    return describe_devices(gpus.present()) or "no NVIDIA GPU here; on=local runs on the CPU"


def provider_checks(target: str) -> Iterator[Check]:
    """What keeps a target from working, or that it is ready."""
    name = f"on={target}"
    try:
        provider = providers.load(target)
        problems = provider.check()
    except Exception as error:
        yield Check(name, False, f"It cannot be loaded: {error}", "Reinstall its package.")
        return
    optional = target not in targets.configured()
    for problem in problems:
        yield Check(name, False, problem.what, problem.mend, optional)
    if not problems:
        hook: Callable[[], str] | None = getattr(provider, "remaining", None)
        yield Check(name, True, f"ready; {hook()}" if hook is not None else "ready")


def _round_trip() -> str:
    """The whole way: a machine, a kernel, a value there and back."""
    from mlinfra_sdk.session import Session

    began = time.monotonic()
    with Session(namespace={}, request=Request(idle=60)) as session:
        session.call(platform.python_version)
        first = time.monotonic() - began
        began = time.monotonic()
        session.call(platform.python_version)
        again = time.monotonic() - began
    return f"on=local answers after {first:.1f} s, then in {again * 1000:.0f} ms"
