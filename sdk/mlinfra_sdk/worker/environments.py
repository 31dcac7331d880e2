"""Environments for kernels: made once, cached for all machines of this user on this host.

A cached environment is never changed. Each machine puts a *layer* on it: a virtual environment of
its own that looks through to the cached one, and takes what is added while a kernel runs.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import distributions
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from mlinfra_sdk.errors import EnvironmentConflict, EnvironmentFailed, RequestError
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.worker.recipe import WHEELS, Prepared, Recipe
from mlinfra_sdk.worker.uv import Tell, run_uv

LIMIT = 40 << 30
"""Bytes that cached environments may take before those unused for longest go."""
_USE = "in-use"
_MANIFEST = "mlinfra.json"
_UNFINISHED = ".unfinished-"
_KEY = re.compile(r"[0-9a-f]{32}")
_OWN_TO_A_LAYER = frozenset(
    {"bin", "lib", "lib64", "include", "pyvenv.cfg", ".lock", ".gitignore", "CACHEDIR.TAG"}
    | {_USE, _MANIFEST}
)


class Manifest(msgspec.Struct):
    """What is known of a cached environment."""

    installed: dict[str, str]
    size: int


class Environments:
    """Those of one machine: layers in ``folder`` on what is cached in ``cache``."""

    def __init__(
        self,
        cache: Path,
        folder: Path,
        store: ChunkStore,
        limit: int = LIMIT,
        kernel: str = "mlinfra_sdk.worker.kernel",
    ) -> None:
        self._cache = cache
        self._folder = folder
        self._store = store
        self._limit = limit
        self._kernel = kernel
        self._uses: dict[str, int] = {}
        """File descriptors that keep the cached environments of this machine from being removed."""
        self._locks: dict[str, anyio.Lock] = {}

    def python(self, key: str) -> Path:
        """The interpreter of a prepared environment. Raises :class:`RequestError`."""
        python = self._layer(key) / "bin" / "python"
        if not python.exists():
            raise RequestError(f"There is no environment {key} on this machine.")
        return python

    def _layer(self, key: str) -> Path:
        if _KEY.fullmatch(key) is None:
            raise RequestError(f"{key!r} cannot be the name of an environment.")
        return self._folder / key

    async def prepare(
        self,
        recipe: Recipe,
        *,
        tell: Tell,
        indexes: Sequence[str] = (),
        key: str = "",
        onto: str = "",
    ) -> Prepared:
        """Make an environment, or find it in the cache by its ``key`` (default: the recipe's);
        with ``onto`` add to that one, which a kernel uses, what it lacks. Nothing half-done stays
        behind.

        Raises :class:`EnvironmentFailed` or one of its kinds.
        """
        key = onto or key or recipe.key
        async with self._locks.setdefault(key, anyio.Lock()):
            try:
                if onto:
                    return await self._add(recipe, onto, tell, indexes)
                return await self._make(recipe, key, tell, indexes)
            except OSError as error:
                raise EnvironmentFailed(
                    f"The environment could not be made: {error}.",
                    hint="Check the disk of the machine.",
                ) from None

    # -- the cache ---------------------------------------------------------------------------

    async def _make(self, recipe: Recipe, key: str, tell: Tell, indexes: Sequence[str]) -> Prepared:
        base = self._cache / key
        added: list[str] = []
        await anyio.to_thread.run_sync(self._discard_damaged, base)
        if not self._use(key):
            self._cache.mkdir(mode=0o700, parents=True, exist_ok=True)
            await anyio.to_thread.run_sync(self._tidy)
            with _unfinished(self._cache) as folder:
                added = await self._build(recipe, folder, tell, indexes)
                with suppress(FileExistsError):  # another agent was faster
                    _rename(folder, base)
            if not self._use(key):
                raise EnvironmentFailed("The environment was removed while it was made.")
            await anyio.to_thread.run_sync(self._tidy)
        layer = self._layer(key)
        if not layer.exists():
            self._folder.mkdir(mode=0o700, exist_ok=True)
            with _unfinished(self._folder) as folder:
                _make_layer(base, folder)
                _rename(folder, layer)
        return Prepared(key, self._installed(key), added)

    async def _build(
        self, recipe: Recipe, folder: Path, tell: Tell, indexes: Sequence[str]
    ) -> list[str]:
        own = ".".join(map(str, sys.version_info[:2]))
        python = sys.executable if recipe.python == own else recipe.python
        tell(f"Python {recipe.python}")
        venv = ["venv", "--quiet", "--relocatable", "--allow-existing", "--no-project"]
        try:
            await run_uv([*venv, "--python", python, str(folder)], folder=folder, tell=tell)
        except EnvironmentFailed as error:
            raise EnvironmentFailed(
                f"Python {recipe.python} cannot be had on the machine. {error.message}",
                hint=f"Objects travel between equal minor versions only: install Python "
                f"{recipe.python} there, or use here a version that it has.",
            ) from None
        with _unfinished(self._cache) as inputs:
            await self._run(
                ["pip", "install", "--python", str(folder / "bin/python")],
                recipe,
                inputs,
                tell,
                indexes,
            )
        tell("Trying it out")
        await self._try_out(folder)
        installed = _installed_in(folder)
        manifest = Manifest(installed, await anyio.to_thread.run_sync(_size_of, folder))
        (folder / _MANIFEST).write_bytes(msgspec.json.encode(manifest))
        return sorted(installed)

    async def _try_out(self, folder: Path) -> None:
        """See that a kernel can start in it, and have the bytecode written that all will need."""
        done = await anyio.run_process(
            [str(folder / "bin/python"), "-c", f"import {self._kernel}"],
            env={key: value for key, value in os.environ.items() if not key.startswith("PYTHON")},
            check=False,
        )
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
            raise EnvironmentFailed(
                "Kernels cannot start in the environment:\n" + "\n".join(said) + "\n",
                hint="Some package in it does not get on with those that every kernel needs.",
            )

    async def _run(
        self,
        command: Sequence[str],
        recipe: Recipe,
        inputs: Path,
        tell: Tell,
        indexes: Sequence[str],
    ) -> str:
        """uv with what the recipe says; the wheels are laid into the folder ``inputs``."""
        wheels = inputs / "wheels"
        await anyio.to_thread.run_sync(self._lay_wheels, recipe, wheels)
        arguments = [*command]
        files = {
            "requirements": recipe.requirements,
            "overrides": recipe.overrides,
            "constraints": recipe.constraints,
        }
        for name, lines in files.items():
            if not lines and name != "requirements":
                continue
            path = inputs / f"{name}.txt"
            text = "\n".join(line.replace(WHEELS, wheels.as_uri()) for line in lines)
            path.write_text(text, encoding="utf-8")
            plain = name == "requirements" and "compile" in command
            arguments.append(str(path) if plain else f"--{name}={path}")
        if recipe.wheels_only:
            arguments += ["--no-index", "--find-links", str(wheels)]
        elif recipe.torch:
            # Its builds lie on an index of their own, which not every machine can reach.
            with suppress(EnvironmentFailed):
                chosen = [*arguments, "--torch-backend", recipe.torch]
                return await run_uv(chosen, folder=inputs, tell=tell, indexes=indexes)
        return await run_uv(arguments, folder=inputs, tell=tell, indexes=indexes)

    def _lay_wheels(self, recipe: Recipe, folder: Path) -> None:
        folder.mkdir()
        for wheel in recipe.wheels:
            if Path(wheel.file).name != wheel.file or not wheel.file.endswith(".whl"):
                raise RequestError(f"{wheel.file!r} cannot be the name of a wheel.")
            with open(folder / wheel.file, "xb") as file:
                for digest in wheel.digests:
                    file.write(self._store.read_chunk(digest))

    def _discard_damaged(self, base: Path) -> None:
        """Have what is not whole any more made again: files that somebody has removed, or an
        interpreter that went with an upgrade of the host."""
        with suppress(OSError, msgspec.MsgspecError, StopIteration):
            msgspec.json.decode((base / _MANIFEST).read_bytes(), type=Manifest)
            if (base / "bin" / "python").exists() and _site_packages(base):
                return
        if not base.exists():
            return
        (base / _USE).touch(mode=0o600)
        if base.name in self._uses or not _remove_unused(base):
            raise EnvironmentFailed(
                f"The environment {base} is damaged, and a machine still uses it.",
                hint="Stop the machines that run there (`mlinfra status`); it is made again then.",
            )

    def _use(self, key: str) -> bool:
        """Keep a cached environment from being removed; False if there is none."""
        path = self._cache / key / _USE
        if key not in self._uses:
            try:
                use = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                return False
            fcntl.flock(use, fcntl.LOCK_SH)
            if not path.exists():  # it was removed just before
                os.close(use)
                return False
            self._uses[key] = use
        os.utime(path)
        return True

    def _tidy(self) -> None:
        """Remove what agents that are gone have left unfinished, and, above the limit, what has
        not been used for longest."""
        total = 0
        found = []
        for path in self._cache.iterdir():
            with suppress(OSError, msgspec.DecodeError, msgspec.ValidationError):
                if path.name.startswith(_UNFINISHED):
                    _remove_unused(path)
                    continue
                manifest = msgspec.json.decode((path / _MANIFEST).read_bytes(), type=Manifest)
                found.append(((path / _USE).stat().st_mtime, path, manifest.size))
                total += manifest.size
        for _, path, size in sorted(found):
            if total <= self._limit:
                break
            with suppress(OSError):
                if _remove_unused(path):
                    total -= size

    # -- layers ------------------------------------------------------------------------------

    def _installed(self, key: str) -> dict[str, str]:
        manifest = msgspec.json.decode((self._cache / key / _MANIFEST).read_bytes(), type=Manifest)
        return manifest.installed | _installed_in(self._layer(key))

    async def _add(self, recipe: Recipe, key: str, tell: Tell, indexes: Sequence[str]) -> Prepared:
        python, layer = self.python(key), self._layer(key)
        have = self._installed(key)
        _require_same(recipe.overrides, have)
        with _unfinished(self._folder) as inputs:
            lines = await self._resolved(recipe, have, python, inputs, tell, indexes)
            missing = [line for line in lines if _name(line) not in {"", *have}]
            if missing:
                additions = inputs / "additions.txt"
                additions.write_text("\n".join(missing), encoding="utf-8")
                staged = inputs / "staged"
                install = ["pip", "install", "--no-deps", "--python", str(python)]
                if recipe.wheels_only:
                    install += ["--no-index", "--find-links", str(inputs / "wheels")]
                elif any("+" in line.partition(";")[0] for line in missing) and recipe.torch:
                    # What was resolved to one of PyTorch's own builds lies on its own index only.
                    install += ["--torch-backend", recipe.torch]
                await run_uv(
                    [*install, "--prefix", str(staged), "--requirements", str(additions)],
                    folder=inputs,
                    tell=tell,
                    indexes=indexes,
                )
                _move_into(staged, layer)
        return Prepared(key, self._installed(key), sorted(map(_name, missing)))

    async def _resolved(
        self,
        recipe: Recipe,
        have: dict[str, str],
        python: Path,
        inputs: Path,
        tell: Tell,
        indexes: Sequence[str],
    ) -> list[str]:
        """All that a recipe needs, as exact requirements that keep what is there."""
        if recipe.wheels_only:  # resolved already
            wheels = inputs / "wheels"
            await anyio.to_thread.run_sync(self._lay_wheels, recipe, wheels)
            return [line.replace(WHEELS, wheels.as_uri()) for line in recipe.requirements]
        recipe = msgspec.structs.replace(
            recipe, constraints=[f"{name}=={version}" for name, version in have.items()]
        )
        command = ["pip", "compile", "--quiet", "--no-header", "--no-annotate"]
        command += ["--python", str(python)]
        return (await self._run(command, recipe, inputs, tell, indexes)).splitlines()


def _require_same(pins: Iterable[str], have: dict[str, str]) -> None:
    """Raise where an installed package would have to change."""
    changes = []
    for pin in pins:
        name, _, version = pin.partition("==")
        installed = have.get(name)
        if version and installed and not SpecifierSet(f"=={version}").contains(installed, True):
            changes.append(f"{name} {installed} would become {version}")
    if changes:
        raise EnvironmentConflict(
            f"The running kernel has other versions than it would need: {'; '.join(changes)}.",
            hint="`%remote restart` gives it a new environment; its variables are sent again.",
        )


def _name(line: str) -> str:
    try:
        return canonicalize_name(Requirement(line).name)
    except InvalidRequirement:
        return ""


def _site_packages(venv: Path) -> Path:
    return next(venv.glob("lib/python*/site-packages"))


def _installed_in(venv: Path) -> dict[str, str]:
    found = distributions(path=[str(_site_packages(venv))])
    return {canonicalize_name(it.name): it.version for it in found}


def _make_layer(base: Path, layer: Path) -> None:
    """A virtual environment that has all of another one's packages without copying them."""
    shutil.copy(base / "pyvenv.cfg", layer)
    site = layer / _site_packages(base).relative_to(base)
    site.mkdir(parents=True)
    # A path alone would not make the .pth files over there be read.
    (site / "_mlinfra.pth").write_text(
        f"import site; site.addsitedir({str(_site_packages(base))!r})\n"
    )
    (layer / "bin").mkdir()
    for path in (base / "bin").iterdir():
        place = layer / "bin" / path.name
        if path.is_symlink():
            place.symlink_to(path.readlink())
        elif path.stat().st_size < 1 << 16:  # a script, which finds the interpreter beside it
            shutil.copy(path, place)
        else:
            place.symlink_to(path)
    for path in base.iterdir():
        if path.name not in _OWN_TO_A_LAYER:
            (layer / path.name).symlink_to(path)


def _move_into(staged: Path, place: Path) -> None:
    """One tree into another one on the same disk. The metadata of packages comes last: what has
    metadata is complete."""
    for path in sorted(staged.iterdir(), key=lambda path: path.suffix == ".dist-info"):
        target = place / path.name
        if path.is_dir() and not path.is_symlink() and target.is_dir():
            _move_into(path, target)
        else:
            os.replace(path, target)


def _size_of(folder: Path) -> int:
    return sum(
        os.lstat(os.path.join(place, file)).st_size
        for place, _, files in os.walk(folder)
        for file in files
    )


def _rename(folder: Path, place: Path) -> None:
    try:
        folder.rename(place)
    except OSError as error:
        if place.is_dir():
            raise FileExistsError(str(place)) from error
        raise


@contextmanager
def _unfinished(parent: Path) -> Iterator[Path]:
    """A folder that is removed in the end, unless it has got another name by then."""
    folder = parent / f"{_UNFINISHED}{secrets.token_hex(8)}"
    folder.mkdir(mode=0o700)
    use = os.open(folder / _USE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(use, fcntl.LOCK_SH)
        yield folder
    finally:
        os.close(use)
        shutil.rmtree(folder, ignore_errors=True)


def _remove_unused(path: Path) -> bool:
    """Remove an environment that nobody uses or makes; False if somebody does."""
    use = os.open(path / _USE, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        if not path.name.startswith(_UNFINISHED):
            path = path.rename(path.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}"))
        shutil.rmtree(path, ignore_errors=True)
        return True
    finally:
        os.close(use)
