"""Wheels that travel: of the SDK, of local projects, of packages that a machine cannot get."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import anyio
import msgspec
from blake3 import blake3

from mlinfra_sdk import paths
from mlinfra_sdk.errors import EnvironmentFailed
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.worker.recipe import WHEELS, Platform, Recipe, Wheel
from mlinfra_sdk.worker.uv import Tell, redacted, run_uv
from mlinfra_sdk.worker.wheel import build_wheel

_CHUNK = 4 << 20
_NOT_SOURCE = frozenset({"__pycache__", "node_modules", "site-packages"})
_NOT_SOURCE_AT_ROOT = frozenset({"build", "dist"})


def shipped(path: Path, store: ChunkStore) -> Wheel:
    """A wheel as chunks in the store."""
    digests = []
    with open(path, "rb") as file:
        while data := file.read(_CHUNK):
            digests.append(store.put_chunk(data))
    return Wheel(path.name, digests)


def of_the_sdk() -> Path:
    """The wheel of the SDK that runs here."""
    folder = _cache("sdk")
    if not _wheel_in(folder).is_file():  # somebody has cleared the cache
        _wheel_in.cache_clear()
    return _wheel_in(folder)


@functools.cache
def _wheel_in(folder: Path) -> Path:
    return build_wheel(folder)


def of_project(project: Path, name: str, tell: Tell) -> Path:
    """The wheel of a project or archive on this disk, built anew when a file of it has changed.

    Raises :class:`EnvironmentFailed`.
    """
    if project.suffix == ".whl" and project.is_file():
        return project
    if not project.exists():
        raise EnvironmentFailed(
            f"{name} was installed from {project}, which is not there any more.",
            hint=f"Install {name} again, or leave it out by env=FILE.",
        )
    folder = _cache("projects") / _state(project)
    ready = next(folder.glob("*.whl"), None)
    if ready is not None:
        return ready
    tell(f"Building {name}")
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        try:
            command = ["build", "--wheel", "--python", sys.executable, "--out-dir", place]
            _run([*command, str(project)], tell)
        except EnvironmentFailed as error:
            raise EnvironmentFailed(
                f"No wheel of {name} can be built from {project}. {error.message}",
                hint="`uv build --wheel` there shows all of it; env=FILE can leave it out.",
            ) from None
        os.makedirs(folder, exist_ok=True)
        (wheel,) = Path(place).glob("*.whl")
        os.replace(wheel, folder / wheel.name)
    return folder / wheel.name


def _state(project: Path) -> str:
    """Changes with the files of a project."""
    hasher = blake3(str(project).encode())
    for path, info in sorted(_files(project)):
        hasher.update(f"\0{path}\0{info.st_size}\0{info.st_mtime_ns}".encode())
    return hasher.hexdigest()[:32]


def _files(project: Path) -> Iterator[tuple[str, os.stat_result]]:
    if project.is_file():
        yield project.name, project.stat()
        return
    for folder, folders, files in os.walk(project):
        if "pyvenv.cfg" in files:  # a virtual environment
            folders.clear()
            continue
        left_out = _NOT_SOURCE | (_NOT_SOURCE_AT_ROOT if folder == str(project) else set())
        folders[:] = [
            it
            for it in folders
            if it not in left_out and not it.startswith(".") and not it.endswith(".egg-info")
        ]
        for file in files:
            path = os.path.join(folder, file)
            try:
                yield path, os.stat(path)
            except OSError:
                continue


def fetch(
    recipe: Recipe,
    local: Iterable[Path],
    platform: Platform,
    have: Iterable[str],
    indexes: Sequence[str],
    tell: Tell,
) -> tuple[Recipe, list[Path]]:
    """Resolve a recipe here and get the wheels for a machine that cannot ask any index: a recipe
    that needs none, and the wheels in it. ``local`` are those of the recipe itself; packages that
    the machine has (``have``) are not fetched. Raises :class:`EnvironmentFailed`."""
    folder = _cache("fetched")
    by_name = {path.name: path for path in local}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        inputs = Path(place)
        for path in by_name.values():
            shutil.copy(path, inputs)
        where = ["--python-version", recipe.python, "--only-binary", ":all:"]
        machine = platform.markers["platform_machine"].replace("arm64", "aarch64")
        system = {"linux": "unknown-linux-gnu", "darwin": "apple-darwin"}.get(
            platform.markers["sys_platform"]
        )
        if system is not None:
            where += ["--python-platform", f"{machine}-{system}"]
        arguments = ["pip", "compile", "--no-header", "--no-annotate", *where]
        for name in ("requirements", "overrides", "constraints"):
            lines: list[str] = getattr(recipe, name)
            file = inputs / f"{name}.txt"
            file.write_text("\n".join(line.replace(WHEELS, inputs.as_uri()) for line in lines))
            if lines:
                option = [str(file)] if name == "requirements" else [f"--{name}", str(file)]
                arguments += option
        resolved = [
            line.replace(inputs.as_uri(), WHEELS)
            for line in _run(arguments, tell, indexes).splitlines()
            if line.strip()
        ]
        there = set(have)
        wanted = [line for line in resolved if " @ " not in line and _name(line) not in there]
        if wanted:
            pins = inputs / "pins.txt"
            pins.write_text("\n".join(wanted))
            tell(f"Downloading {len(wanted)} packages here")
            _download(pins, folder, inputs / "new", recipe.python, platform, indexes)
            for path in sorted((inputs / "new").glob("*.whl")):
                by_name[path.name] = folder / path.name
                os.replace(path, folder / path.name)
    files = list(by_name.values())
    # Extras have done their work in the resolution, and markers hold for this machine.
    return msgspec.structs.replace(recipe, requirements=resolved, wheels_only=True, torch=""), files


def _name(line: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", line)
    return re.sub(r"[-_.]+", "-", match[0]).lower() if match else ""


def _download(
    pins: Path, known: Path, place: Path, python: str, platform: Platform, indexes: Sequence[str]
) -> None:
    """With pip, since uv gives no wheels."""
    abi = f"cp{python.replace('.', '')}"
    arguments = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(place)]
    arguments += ["--find-links", str(known), "--requirement", str(pins)]
    arguments += ["--implementation=cp", f"--python-version={python}"]
    arguments += [f"--abi={it}" for it in (abi, "abi3", "none")]
    arguments += [f"--platform={it}" for it in (*platform.tags, "any")]
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else None
    told = {"PIP_EXTRA_INDEX_URL": " ".join(indexes)} if indexes else {}
    if pip is None:
        _run(["tool", "run", "pip", *arguments], lambda text: None, indexes, told)
        return

    async def run() -> str:
        env = os.environ | told
        done = await anyio.run_process([*pip, *arguments], env=env, check=False)
        return "" if done.returncode == 0 else done.stderr.decode(errors="replace")

    said = portal().call(run())
    if said:
        raise EnvironmentFailed(
            f"The wheels for the machine cannot be had here either. pip says:\n"
            f"{redacted(said.strip())[-2000:]}\n",
        )


def _run(
    arguments: Sequence[str],
    tell: Tell,
    indexes: Sequence[str] = (),
    env: Mapping[str, str] = MappingProxyType({}),
) -> str:
    folder = Path(tempfile.gettempdir())
    return portal().call(run_uv(arguments, folder=folder, tell=tell, indexes=indexes, env=env))


def _cache(kind: str) -> Path:
    folder = paths.cache_dir() / "wheels" / kind
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
