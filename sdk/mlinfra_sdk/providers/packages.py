"""The packages that the SDK needs: their versions here, and a copy for a machine without internet.

The copy is taken from this environment where a package fits the machine as it is, and downloaded
for the machine's platform where not.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path, PurePosixPath
from typing import IO

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import (
    Tag,
    compatible_tags,
    cpython_tags,
    mac_platforms,
    parse_tag,
)
from packaging.utils import canonicalize_name

from mlinfra_sdk.errors import ProviderError

_SDK = "mlinfra-sdk"
_UV = PurePosixPath("bin/uv")
"""Where uv finds its program beside its package."""
_VERSION = sys.version_info[:2]


class Platform:
    """The machine's, as its Python tells it: ``linux-x86_64`` and ``glibc-2.36``."""

    def __init__(self, name: str, libc: str) -> None:
        self.name = name
        system, _, rest = name.partition("-")
        if system == "macosx":
            release, _, self.machine = rest.partition("-")
            major, minor = (int(part) for part in release.split("."))
            self.platforms = list(mac_platforms((major, minor), self.machine))
        else:
            self.machine = rest
            self.platforms = list(_linux_platforms(rest, libc))
        self._markers = {
            "sys_platform": "darwin" if system == "macosx" else system,
            "platform_system": "Darwin" if system == "macosx" else system.capitalize(),
            "platform_machine": self.machine,
        }

    def environment(self) -> dict[str, str]:
        """Values of the markers of requirements there."""
        return {key: str(it) for key, it in default_environment().items()} | self._markers

    def tags(self) -> set[Tag]:
        """Wheels of which tags fit there."""
        interpreter = f"cp{_VERSION[0]}{_VERSION[1]}"
        return {
            *cpython_tags(_VERSION, platforms=self.platforms),
            *compatible_tags(_VERSION, interpreter, self.platforms),
        }


def _linux_platforms(machine: str, libc: str) -> Iterator[str]:
    found = re.fullmatch(r"glibc-2\.(\d+)", libc)
    if found:
        for minor in range(int(found[1]), 4, -1):
            yield f"manylinux_2_{minor}_{machine}"
            legacy = {17: "2014", 12: "2010", 5: "1"}.get(minor)
            if legacy:
                yield f"manylinux{legacy}_{machine}"
    else:
        yield from (f"musllinux_1_{minor}_{machine}" for minor in (2, 1, 0))
    yield f"linux_{machine}"


def pins() -> str:
    """Lines of ``NAME==VERSION``: everything that the SDK needs, as it is here."""
    versions = {
        name: found.version.partition("+")[0]
        for name, found in _needed({key: str(it) for key, it in default_environment().items()})
        if found is not None and name != _SDK
    }
    return "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))


def _needed(environment: dict[str, str]) -> Iterator[tuple[str, Distribution | None]]:
    """(name, what is installed here) of all that the SDK needs there, itself first."""
    waiting = [Requirement(_SDK)]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        extras = {"", *requirement.extras} - {extra for known, extra in seen if known == name}
        if not extras:
            continue
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if (name, "") not in seen:
            yield name, found
        seen |= {(name, extra) for extra in extras}
        for text in (found.requires or []) if found else []:
            needed = Requirement(text)
            if needed.marker is None or any(
                needed.marker.evaluate({**environment, "extra": extra}) for extra in extras
            ):
                waiting.append(needed)


def write_tree(wheel: Path, platform: Platform, file: IO[bytes]) -> None:
    """Write what has to lie in a machine's ``site-packages``, the SDK's own wheel included, as
    ``tar.gz``. Raises :class:`ProviderError` if a package can neither be copied nor downloaded."""
    fitting = platform.tags()
    absent = []
    with tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tree:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                _add(tree, name, archive.read(name))
        for name, found in _needed(platform.environment()):
            if name == _SDK:
                continue
            if found is None or not _can_be_copied(found, fitting):
                version = f"=={found.version.partition('+')[0]}" if found else ""
                absent.append(name + version)
                continue
            for path in found.files or []:
                if _is_of_the_package(path):
                    _add(tree, path.as_posix(), Path(str(found.locate_file(path))).read_bytes())
        if absent:
            with tempfile.TemporaryDirectory(prefix="mlinfra-") as folder:
                _download(absent, platform, Path(folder))
                for below in sorted(Path(folder).rglob("*")):
                    inner = below.relative_to(folder)
                    if below.is_file() and _is_of_the_package(PurePosixPath(inner)):
                        _add(tree, inner.as_posix(), below.read_bytes())


def _can_be_copied(found: Distribution, fitting: set[Tag]) -> bool:
    """Whether its files are known, lie here and are right for the machine."""
    if not found.files or '"editable": true' in (found.read_text("direct_url.json") or ""):
        return False
    tags = re.findall(r"^Tag: (\S+)$", found.read_text("WHEEL") or "", re.M)
    return any(not fitting.isdisjoint(parse_tag(tag)) for tag in tags)


def _is_of_the_package(path: PurePosixPath) -> bool:
    """Not a script, except uv itself, nor what Python makes again by itself."""
    if path.parts[-2:] == _UV.parts:
        return True
    return path.parts[0] not in ("..", "/", "bin") and path.suffix != ".pyc"


def _add(tree: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    if PurePosixPath(name).parts[-2:] == _UV.parts:
        member.name, member.mode = str(_UV), 0o755
    tree.addfile(member, io.BytesIO(data))


def _download(requirements: list[str], platform: Platform, folder: Path) -> None:
    """Put packages for another platform into ``folder``, by uv or pip, whichever is here."""
    said = "neither uv nor pip is here"
    for tool in _installers(platform):
        where = ["--target", str(folder), "--only-binary", ":all:", "--no-deps", "--quiet"]
        done = subprocess.run(
            [*tool, *where, *requirements],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode == 0:
            return
        said = done.stderr.strip()[-500:]
    raise ProviderError(
        f"The machine cannot get the packages that it needs from an index, and {requirements[0]} "
        f"and others for {platform.name} cannot be sent from here: {said}.",
        hint="Let one of the two reach a package index.",
    )


def _installers(platform: Platform) -> Iterator[list[str]]:
    """The commands that install for another platform."""
    version = f"{_VERSION[0]}.{_VERSION[1]}"
    uv = shutil.which("uv")
    if uv:
        system, machine = platform.name.partition("-")[0], platform.machine
        floor = "28" if f"manylinux_2_28_{machine}" in platform.platforms else "17"
        there = f"{machine}-manylinux_2_{floor}"
        if "musl" in platform.platforms[0]:
            there = f"{machine}-unknown-linux-musl"
        elif system == "macosx":
            there = "aarch64-apple-darwin" if machine == "arm64" else f"{machine}-apple-darwin"
        yield [uv, "pip", "install", "--python-version", version, "--python-platform", there]
    if importlib.util.find_spec("pip"):
        tags = [word for name in platform.platforms for word in ("--platform", name)]
        yield [sys.executable, "-m", "pip", "install", "--python-version", version, *tags]
