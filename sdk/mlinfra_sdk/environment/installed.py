"""The distributions installed here: which one brings a module, and what each needs."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from mlinfra_sdk.environment import builds
from mlinfra_sdk.environment.imports import imports_of_file, is_standard, origins

# Folders that installers put packages in.
_PACKAGES = frozenset({"site-packages", "dist-packages"})
# Extras that no user of a package needs, and those that only gather others, by a word in the name.
_NOT_FOR_USE = re.compile(
    r"(?<![a-z])(tests?|testing|dev|devel|develop|development|docs?|documentation|lint|linting|"
    r"linters?|typ(e|es|ed|ing)|type-?check(ing)?|type-?hints?|build|bench|benchmarks?|"
    r"benchmarking|examples?|ci|all|qa)(?![a-z])",
    re.IGNORECASE,
)


@dataclass
class Pin:
    """One distribution at the version that is installed here."""

    name: str
    version: str
    asked_by: str
    """Who needs it, as the end of a sentence."""
    extras: set[str] = field(default_factory=set)
    direct: str = ""
    """The URL that it was installed from instead of from an index."""

    @property
    def folder(self) -> Path | None:
        """The project or archive on this disk that it was installed from."""
        return _on_disk(self.direct)


def _on_disk(url: str) -> Path | None:
    parts = urlsplit(url)
    return Path(url2pathname(unquote(parts.path))) if parts.scheme == "file" else None


def find(name: str) -> Distribution | None:
    """The distribution of this name, if it is installed."""
    found = list(Distribution.discover(name=name)) if name else []
    if len(found) > 1:  # what a build has left in a project's folder comes first on the path there
        found.sort(key=lambda it: it.read_text("RECORD") is None)
    return found[0] if found else None


def _stated_all(found: Distribution, key: str) -> list[str]:
    """The fields of this name in its metadata; none if that is gone, as after a broken removal."""
    try:
        return [str(it) for it in found.metadata.get_all(key) or ()]
    except (OSError, TypeError, AttributeError):  # by version of Python and importlib_metadata
        return []


def _stated(found: Distribution, key: str) -> str:
    """The first of these fields, or nothing."""
    return next(iter(_stated_all(found, key)), "")


def direct_url(found: Distribution) -> dict[str, Any]:
    """Where a distribution was installed from, if not from an index (PEP 610)."""
    try:
        content = json.loads(found.read_text("direct_url.json") or "{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _direct(found: Distribution) -> str:
    content = direct_url(found)
    url = str(content.get("url", ""))
    version_control = content.get("vcs_info")
    if isinstance(version_control, dict):
        below = content.get("subdirectory")
        within = f"#subdirectory={below}" if below else ""
        return f"{version_control['vcs']}+{url}@{version_control['commit_id']}{within}"
    place = _on_disk(url)
    if place is not None and not _is_editable(content) and not place.exists():
        return ""  # conda names a folder of its build machines: an index may have that version
    return url


def _is_editable(content: Mapping[str, Any]) -> bool:
    return bool(content.get("dir_info", {}).get("editable"))


@dataclass
class _Editable:
    """A project whose modules are imported from where they are written."""

    name: str
    project: Path
    on_path: list[Path] = field(default_factory=list)
    """Folders that it puts on the path."""
    by_hook: bool = False
    """Whether its modules are found by code of its own, which does not say which they are."""

    def brings(self, module: str, place: Path) -> bool:
        """Whether a module that lies at ``place`` is its."""
        if self.by_hook and _is_in(place, self.project):
            return True
        stem = place.with_name(place.name.partition(".")[0])
        if stem.name == "__init__":
            stem = stem.parent
        names = tuple(module.split("."))
        inner = [stem.relative_to(it).parts for it in self.on_path if stem.is_relative_to(it)]
        return any(it and it == names[: len(it)] for it in inner)


class Sources:
    """Where modules come from: found once, and again when something was installed."""

    def __init__(self) -> None:
        self._state: object = None
        self._modules: dict[str, frozenset[str]] = {}
        self._by_module: dict[str, set[str]] | None = None
        self._editable: dict[str, _Editable] | None = None

    def distributions_for(self, modules: Iterable[str]) -> dict[str, str]:
        """The installed distributions that bring these modules, and the modules of the workspace
        that they import; each with the module that asks for it."""
        state = _state_of_path()
        if state != self._state:
            self.__init__()  # type: ignore[misc]
            self._state = state
        found: dict[str, str] = {}
        waiting = list(modules)
        looked_at: set[str] = set()
        looked_through: set[Path] = set()
        while waiting:
            module = waiting.pop()
            if module in looked_at or is_standard(module):
                continue
            looked_at.add(module)
            names = self._modules.get(module)
            if names is None:
                names = self._modules[module] = frozenset(self._owners(module))
            for name in names:
                found.setdefault(name, module)
            if self._is_written_here(names):
                for place in _to_look_through(module):
                    if place not in looked_through:
                        looked_through.add(place)
                        waiting += imports_of_file(place)
        return found

    def _owners(self, module: str) -> list[str]:
        places = origins(module)
        editable = self._editables().values()
        edited = [it.name for it in editable if any(it.brings(module, place) for place in places)]
        if edited and places[0].is_file():
            return edited
        top = module.partition(".")[0]
        names = sorted(self._by_top_level().get(top, ()))
        if len(names) > 1:  # a package whose parts are distributions
            namesake = canonicalize_name(top)
            names = _most_specific(names, module) or ([namesake] if namesake in names else names)
        return edited + [name for name in names if self._may_bring(name, places)]

    def _may_bring(self, name: str, places: list[Path]) -> bool:
        """Whether a distribution can be what holds a module at one of these places. What else has
        a module of this name is not what is imported, but say, a file beside the notebook."""
        found = find(name)
        folders = [Path(str(found.locate_file("")))] if found is not None else []
        if name in self._editables():
            folders.append(self._editables()[name].project)
        return not places or any(
            not _PACKAGES.isdisjoint(place.parts) or any(_is_in(place, it) for it in folders)
            for place in places
        )

    def _is_written_here(self, names: frozenset[str]) -> bool:
        """Whether a module that these bring may be the workspace's. A notebook beside a project
        that is found by a hook has modules of its own there."""
        editables = self._editables()
        return all(name in editables and editables[name].by_hook for name in names)

    def _by_top_level(self) -> dict[str, set[str]]:
        """Names of distributions by each of their top-level modules."""
        if self._by_module is None:
            by_module: dict[str, set[str]] = {}
            for found in distributions():
                name = canonicalize_name(_stated(found, "Name"))
                for module in _top_levels(found) if name else ():
                    by_module.setdefault(module, set()).add(name)
            self._by_module = by_module
        return self._by_module

    def _editables(self) -> dict[str, _Editable]:
        """Editable distributions by name."""
        if self._editable is None:
            every = [_editable(found) for found in distributions()]
            self._editable = {it.name: it for it in every if it is not None}
        return self._editable


def _editable(found: Distribution) -> _Editable | None:
    content = direct_url(found)
    project = _on_disk(str(content.get("url", "")))
    name = _stated(found, "Name") if _is_editable(content) else ""
    if project is None or not name:
        return None
    made = _Editable(canonicalize_name(name), project)
    for file in found.files or ():
        place = Path(str(file.locate()))
        if place.suffix != ".pth" or not place.is_file():
            continue
        for line in place.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("import ", "import\t")):
                made.by_hook = not found.read_text("top_level.txt")
            elif line.strip():
                made.on_path.append(place.parent / line.strip())
    return made


def _is_in(place: Path, folder: Path) -> bool:
    """Whether a module is in the folder, and not in an environment inside it."""
    for resolve in (os.path.abspath, os.path.realpath):  # either may be by way of a link
        inner = Path(resolve(place))
        if inner.is_relative_to(resolve(folder)):
            return _PACKAGES.isdisjoint(inner.relative_to(resolve(folder)).parts)
    return False


def _to_look_through(module: str) -> list[Path]:
    """The files of a module of the workspace, or all folders of the package that it is in."""
    inner = origins(module)
    outer = origins(module.partition(".")[0])
    around = [it for it in outer if any(place.is_relative_to(it) for place in inner)]
    return [place for place in around if place.suffix in (".py", "")]


def _state_of_path() -> object:
    """Changes when a distribution is installed or removed."""
    state = []
    for place in sys.path:
        try:
            state.append((place, os.stat(place).st_mtime_ns))
        except OSError:
            continue
    return tuple(item for item in state if "-packages" in item[0])


def _top_levels(found: Distribution) -> set[str]:
    """Top-level modules of a distribution. (``packages_distributions`` of the standard library
    takes ten times as long.)"""
    declared = found.read_text("top_level.txt")
    if declared is not None:
        return set(declared.split())
    lines = (found.read_text("RECORD") or "").splitlines()
    first = {line.partition("/")[0].partition(",")[0] for line in lines}
    return {name.partition(".")[0] for name in first} - {""}  # of ../../bin/script


def _most_specific(names: list[str], module: str) -> list[str]:
    parts = module.split(".")
    for length in range(len(parts), 1, -1):
        stem = "/".join(parts[:length])
        fitting = [
            name
            for name in names
            if any(str(file).startswith((f"{stem}/", f"{stem}.")) for file in _files(name))
        ]
        if fitting:
            return fitting
    return []


def _files(name: str) -> Iterable[PurePath]:
    found = find(name)
    return (found.files if found else None) or ()


def _requirements(found: Distribution) -> list[Requirement]:
    requirements = []
    try:
        stated = found.requires or ()
    except (OSError, TypeError, AttributeError):  # as above
        stated = ()
    for text in stated:
        try:
            requirements.append(Requirement(text))
        except InvalidRequirement:
            continue
    return requirements


def closure(roots: Mapping[str, str], markers: Mapping[str, str]) -> dict[str, Pin]:
    """Pins of the roots, each given with who asks for it, and of all that they need on a machine
    with these markers. What is only needed over there and not installed here, or without a version
    here, is left out."""
    pins: dict[str, Pin] = {}
    requirements: dict[str, list[Requirement]] = {}
    waiting = [(name, frozenset[str](), who) for name, who in roots.items()]
    while waiting:
        name, extras, who = waiting.pop()
        pin = pins.get(name)
        if pin is None:
            found = find(name)
            version = _stated(found, "Version") if found is not None else ""
            if found is None or not version:
                continue
            pin = pins[name] = Pin(name, version, who, set(), _direct(found))
            requirements[name] = _requirements(found)
        elif extras <= pin.extras:
            continue
        pin.extras |= extras
        for needed in requirements[name]:
            child = canonicalize_name(needed.name)
            if not builds.is_part(child, name) and _applies(needed, markers, pin.extras):
                waiting.append((child, frozenset(needed.extras), f"{name} needs it"))
    return pins


def optional(name: str, markers: Mapping[str, str]) -> list[str]:
    """Installed distributions that a package makes use of where they are there: those of its
    extras, except extras for its own development."""
    found = find(name)
    if found is None:
        return []
    every = set(_stated_all(found, "Provides-Extra"))
    extras = {it for it in every if not _NOT_FOR_USE.search(it)}
    needed = {
        canonicalize_name(it.name)
        for it in _requirements(found)
        if not _applies(it, markers, set())
        and _applies(it, markers, extras)
        and not builds.is_part(canonicalize_name(it.name), name)
    }
    return sorted(it for it in needed if it != name and find(it) is not None)


def _applies(requirement: Requirement, markers: Mapping[str, str], extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(
        marker.evaluate({**markers, "extra": extra}) for extra in ("", *sorted(extras))
    )
