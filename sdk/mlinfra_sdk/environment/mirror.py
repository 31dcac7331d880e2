"""``env=``: one session's packages on one machine."""

from __future__ import annotations

import concurrent.futures
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from blake3 import blake3

from mlinfra_sdk.environment import builds, files, wheels
from mlinfra_sdk.environment.imports import is_standard
from mlinfra_sdk.environment.indexes import configured_indexes, travelling
from mlinfra_sdk.environment.installed import Pin, Sources, closure, optional
from mlinfra_sdk.errors import (
    EnvironmentConflict,
    EnvironmentFailed,
    IndexUnreachable,
    PackageUnavailable,
    RequestError,
)
from mlinfra_sdk.frontend import Frontend
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.recipe import WHEELS, Platform, Prepared, Recipe
from mlinfra_sdk.worker.records import Record
from mlinfra_sdk.worker.uv import redacted

MIRROR, NONE = "mirror", "none"
_SDK = "mlinfra-sdk"
_ALWAYS = (_SDK, "pip")
# The agent has it; no kernel needs it.
_NEVER = "uv ; sys_platform == 'never'"
_sources = Sources()
_sources_lock = threading.Lock()


class Packages:
    """What is installed on a machine for one session, and what its cells need there.

    ``mode`` is the value of ``env=``.
    """

    def __init__(self, store: ChunkStore, mode: str = NONE) -> None:
        self.mode = mode
        self.credentials = False
        """Whether passwords of indexes may travel."""
        self.key = ""
        """The environment of the kernel that runs; empty: the machine's own Python."""
        self._store = store
        self._installed: dict[str, str] = {}
        self._made_by = self._state = ""
        """The ``env=`` that the environment was made by, and the state of that file then."""
        self._platform: Platform | None = None
        self._roots: dict[str, str] = {}
        self._indexes: list[str] = []
        """Those that the file names, with the credentials in their URLs."""

    @property
    def active(self) -> bool:
        """Whether kernels are to have an environment of their own."""
        return self.mode != NONE

    def warm_up(self) -> None:
        """Look through what is installed here, while a machine starts."""

        def look() -> None:
            with _sources_lock:
                _sources.distributions_for(("no-such-module",))
            closure(dict.fromkeys(_ALWAYS, ""), _markers_here())

        threading.Thread(target=look, name="mlinfra-packages", daemon=True).start()

    def renew(self, client: AgentClient, modules: Iterable[str], frontend: Frontend) -> str:
        """Prepare an environment for a fresh kernel, with all that was ever needed; gives its key.

        Raises :class:`EnvironmentFailed`.
        """
        known = self._roots.copy()
        try:
            self._note(modules)
            return self._prepare(client, frontend, onto="")
        except BaseException:
            self._roots = known
            raise

    def add(self, client: AgentClient, modules: Iterable[str], frontend: Frontend) -> None:
        """Add what the modules need to the environment of the kernel that runs. Raises
        :class:`EnvironmentConflict` where that would change what it has."""
        if self._made_by not in ("", self.mode):
            raise EnvironmentConflict(
                f"The running kernel has the environment of env={self._made_by}, "
                f"not that of env={self.mode}.",
                hint="`%remote restart` gives it a new environment; its variables are sent again.",
            )
        if self._made_by and self._state != self._state_of_file():
            self._state = self._state_of_file()
            frontend.note(f"{self.mode} has changed: `%remote restart` takes the new environment.")
        known = self._roots.copy()
        try:
            if self.key and self.mode == MIRROR and self._note(modules):
                self._prepare(client, frontend, onto=self.key)
        except BaseException:
            self._roots = known
            raise

    def moved(self) -> None:
        """The session has got another machine."""
        self.take("")
        self._platform = None

    def take(self, key: str) -> None:
        """The session has turned to a kernel with this environment."""
        if key != self.key:
            self.key, self._made_by, self._installed = key, "", {}

    def _state_of_file(self) -> str:
        if self.mode == MIRROR:
            return ""
        try:
            return str(os.stat(self.mode).st_mtime_ns)
        except OSError:
            return "gone"

    def _note(self, modules: Iterable[str]) -> bool:
        """Remember what is needed; False if that was known."""
        with _sources_lock:
            found = _sources.distributions_for(it for it in modules if not is_standard(it))
        fresh = {name: f"{it} is imported" for name, it in found.items() if name not in self._roots}
        self._roots |= fresh
        wanted = set(fresh)
        for name in fresh:
            wanted.update(optional(name, self._markers()))
        return not wanted <= self._installed.keys()

    def _markers(self) -> dict[str, str]:
        return self._platform.markers if self._platform is not None else _markers_here()

    # -- what to install ---------------------------------------------------------------------

    def _prepare(self, client: AgentClient, frontend: Frontend, onto: str) -> str:
        frontend.phase("environment")
        if self._platform is None:
            self._platform = client.ask(m.AskPlatform(client.next_id()), Platform)
        tell = frontend.detail
        draft = Draft(self._platform)
        if self.mode == MIRROR:
            draft.mirror(self._roots)
        else:
            draft.from_file(Path(self.mode), frontend.note)
        self._indexes = draft.indexes
        recipe, local = draft.finish(self._store, tell)
        key = draft.key(recipe)
        try:
            try:
                prepared = self._ask(client, frontend, recipe, local, key, onto)
            except PackageUnavailable as error:
                have = self._installed if onto else {}
                prepared = self._ship(client, frontend, recipe, local, error, have, key, onto)
        except EnvironmentConflict:
            raise
        except EnvironmentFailed as error:
            raise draft.explained(error) from None
        self.key, self._installed = prepared.key, prepared.installed
        self._made_by, self._state = self.mode, self._state_of_file()
        return prepared.key

    def _ship(
        self,
        client: AgentClient,
        frontend: Frontend,
        recipe: Recipe,
        local: list[Path],
        error: PackageUnavailable,
        have: Iterable[str],
        key: str,
        onto: str,
    ) -> Prepared:
        """The machine cannot get what it needs: get it here and send it."""
        assert self._platform is not None
        try:
            shipped, paths = wheels.fetch(
                recipe,
                local,
                self._platform,
                have,
                [*self._indexes, *configured_indexes(credentials=True, here=True)],
                frontend.detail,
            )
        except EnvironmentFailed as here:
            if isinstance(error, IndexUnreachable) and not isinstance(here, IndexUnreachable):
                raise here from None
            raise error from None
        frontend.detail("sending wheels")
        sent = [wheels.shipped(path, self._store) for path in paths]
        shipped = msgspec.structs.replace(shipped, wheels=sent)
        return self._ask(client, frontend, shipped, paths, key, onto)

    def _ask(
        self,
        client: AgentClient,
        frontend: Frontend,
        recipe: Recipe,
        local: list[Path],
        key: str,
        onto: str,
    ) -> Prepared:
        client.upload([digest for wheel in recipe.wheels for digest in wheel.digests])
        name = secrets.token_hex(8)
        news: queue.SimpleQueue[str] = queue.SimpleQueue()

        async def take(record: Record) -> None:
            news.put(msgspec.json.decode(record.content)["text"])

        client.listen(name, take)
        indexes = travelling(self._indexes, credentials=self.credentials)
        indexes += configured_indexes(credentials=self.credentials)
        request = m.Prepare(client.next_id(), name, recipe, key, onto, indexes)
        future = client.send(request)
        try:
            while True:
                try:
                    return m.decode_as(Prepared, future.result(0.2))
                except concurrent.futures.TimeoutError:
                    if future.done():
                        raise
                while not news.empty():
                    frontend.detail(news.get())
                frontend.tick()
        except BaseException:
            if client.closed is None:
                client.send(m.GiveUp(client.next_id(), name))
            raise
        finally:
            client.ignore(name)


class Draft:
    """A recipe in the making, and why each package is in it."""

    def __init__(self, platform: Platform) -> None:
        python = f"{sys.version_info[0]}.{sys.version_info[1]}"
        here = _markers_here()
        versions = ("python_version", "python_full_version", "implementation_version")
        self._platform = platform
        self._markers = platform.markers | {key: here[key] for key in versions}
        self._recipe = Recipe(python, overrides=[_NEVER])
        self._pins: dict[str, Pin] = {}
        self._projects: dict[str, Path] = {}
        self._stated: list[files.Project] = []
        self._torch = ""
        self.indexes: list[str] = []
        """Indexes that a file names, with the credentials in their URLs."""

    def mirror(self, roots: dict[str, str]) -> None:
        """All that the roots need, at the versions that are installed here."""
        roots = dict.fromkeys(_ALWAYS, "every kernel needs it") | roots
        for name in list(roots):
            if name not in _ALWAYS:
                for other in optional(name, self._markers):
                    roots.setdefault(other, f"{name} uses it where it is installed")
        self._pins = closure(roots, self._markers)
        if builds.TORCH in self._pins:
            self._torch = builds.torch_backend(self._platform)
        for pin in sorted(self._pins.values(), key=lambda pin: pin.name):
            extras = sorted(pin.extras.union(builds.extras(pin.name, self._platform)))
            suffix = f"[{','.join(extras)}]" if extras else ""
            exact = f"=={builds.public(pin.version)}"
            if pin.name == "uv":
                continue
            if pin.name == _SDK:
                self._projects[_SDK] = wheels.of_the_sdk()
            elif pin.folder is not None:
                self._projects[pin.name] = pin.folder
            elif pin.direct:
                exact = f" @ {pin.direct}"
            if pin.name in self._projects:
                exact = f" @ {pin.name}"  # known when its wheel is
            self._recipe.overrides.append(pin.name + exact)
            if pin.name in roots:
                self._recipe.requirements.append(pin.name + suffix + exact)

    def from_file(self, path: Path, note: Callable[[str], None]) -> None:
        """What a file states, and what kernels need."""
        stated = files.read(path)
        for text in stated.notes:
            note(text)
        self._recipe.requirements.extend(stated.requirements)
        self._recipe.constraints.extend(stated.constraints)
        self._stated = stated.projects
        # PyTorch may come with any package; where it does not, this has no effect.
        self._torch = builds.torch_backend(self._platform)
        # As an index, one of PyTorch's would hide other packages: uv takes each package from the
        # first index that has it. That of the CPU's build is often there for macOS beside another.
        stated_builds = [it for it in map(builds.torch_build, stated.indexes) if it]
        if self._torch and stated_builds:
            self._torch = next((it for it in stated_builds if it != "cpu"), "cpu")
        self.indexes = [it for it in stated.indexes if not builds.torch_build(it)]
        self._projects[_SDK] = wheels.of_the_sdk()
        self._recipe.requirements.append(f"{_SDK} @ {_SDK}")  # known when its wheel is
        # Objects are pickled by it on both sides.
        pickler = closure({"cloudpickle": "every kernel needs it"}, self._markers)
        self._pins = pickler
        self._recipe.overrides.extend(f"{it.name}=={it.version}" for it in pickler.values())

    def finish(self, store: ChunkStore, tell: Callable[[str], None]) -> tuple[Recipe, list[Path]]:
        """The recipe, and the wheels in it."""
        paths = {
            name: wheels.of_project(project, name, tell) for name, project in self._projects.items()
        }
        urls = {name: f"{WHEELS}/{path.name}" for name, path in paths.items()}
        requirements = {_with_url(line, urls) for line in self._recipe.requirements}
        by_file = {path.name: path for path in paths.values()}
        for stated in self._stated:
            path = wheels.of_project(stated.path, stated.path.name, tell)
            requirements.add(stated.requirement(path.name, f"{WHEELS}/{path.name}"))
            # The SDK that runs here is the one that fits.
            if by_file.setdefault(path.name, path) != path and path.name != paths[_SDK].name:
                raise RequestError(
                    f"Two projects that env= states are both {path.name}, one of them "
                    f"{stated.path}.",
                    hint="Leave one of them out.",
                )
        overrides = {_with_url(line, urls) for line in self._recipe.overrides}
        return (
            msgspec.structs.replace(
                self._recipe,
                requirements=sorted(requirements),
                overrides=sorted(overrides),
                wheels=[wheels.shipped(by_file[file], store) for file in sorted(by_file)],
                torch=self._torch,
            ),
            list(by_file.values()),
        )

    def key(self, recipe: Recipe) -> str:
        """Names the environment: other indexes may have other packages of the same version."""
        if not self.indexes:
            return recipe.key
        return blake3(redacted(f"{recipe.key} {' '.join(self.indexes)}").encode()).hexdigest()[:32]

    def explained(self, error: EnvironmentFailed) -> EnvironmentFailed:
        """An error of uv with who asks for the packages that it names."""
        reasons = [
            f"{pin.name} {pin.version} is installed here; {pin.asked_by}."
            for pin in self._pins.values()
            if f" {pin.name}==" in error.message or f" {pin.name} was" in error.message
        ]
        hint = error.hint or (
            "Install here a version that an index has, leave the import out, or state by env=FILE "
            "what the machine is to have."
        )
        return type(error)("\n".join([error.message.rstrip(), *reasons, ""]), hint=hint)


def _with_url(line: str, urls: dict[str, str]) -> str:
    head, at, name = line.partition(" @ ")
    return f"{head} @ {urls[name]}" if at and name in urls else line


def _markers_here() -> dict[str, str]:
    from packaging.markers import default_environment

    return {key: str(value) for key, value in default_environment().items()}
