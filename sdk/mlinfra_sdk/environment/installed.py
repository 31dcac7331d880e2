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
from mlinfra_sdk.environment.imports import imports_of_file, is_standard, origin

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


def _stated(found: Distribution, key: str) -> str:
    """A field of its metadata; empty if that lacks it or is gone, as after a broken removal."""
    try:
        values = found.metadata.get_all(key)
    except (OSError, TypeError):  # by version of Python
        values = None
    return str(values[0]) if values else ""


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
        return f"{version_control['vcs']}+{url}@{version_control['commit_id']}"
    place = _on_disk(url)
    if place is not None and not _is_editable(content) and not place.exists():
        return ""  # conda names a folder of its build machines: an index may have that version
    return url


def _is_editable(content: Mapping[str, Any]) -> bool:
    return bool(content.get("dir_info", {}).get("editable"))


class Sources:
    """Where modules come from: found once, and again when something was installed."""

    def __init__(self) -> None:
        self._state: object = None
        self._modules: dict[str, frozenset[str]] = {}
        self._by_module: dict[str, set[str]] | None = None
        self._editable: dict[str, str] | None = None

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
        looked_through: set[str] = set()
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
            top = module.partition(".")[0]
            if not names and top not in looked_through:
                looked_through.add(top)
                place = origin(top)
                if place is not None and place.suffix in (".py", ""):
                    waiting += imports_of_file(place)
        return found

    def _owners(self, module: str) -> list[str]:
        top = module.partition(".")[0]
        namesake = find(top)
        if namesake is not None and top in _top_levels(namesake):
            name = _stated(namesake, "Name")
            if name:
                return [canonicalize_name(name)]
        if self._by_module is None:
            by_module: dict[str, set[str]] = {}
            for found in distributions():
                name = canonicalize_name(_stated(found, "Name"))
                for module_of_it in _top_levels(found) if name else ():
                    by_module.setdefault(module_of_it, set()).add(name)
            self._by_module = by_module
        names = sorted(self._by_module.get(top, ()))
        if len(names) > 1:  # a package whose parts are distributions
            names = _most_specific(names, module) or names
        if not names:
            place = origin(top)
            if place is not None:
                folder = place.parent.parent if place.name == "__init__.py" else place.parent
                names = [name for name in (self._editables().get(str(folder)),) if name]
        return names

    def _editables(self) -> dict[str, str]:
        """Folders that editable distributions put on the path, by folder."""
        if self._editable is None:
            editable: dict[str, str] = {}
            for found in distributions():
                if _is_editable(direct_url(found)):
                    name = canonicalize_name(_stated(found, "Name"))
                    for file in found.files or ():
                        if file.suffix == ".pth":
                            for line in file.read_text().splitlines():
                                editable[line.strip()] = name
            self._editable = editable
        return self._editable


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
    for text in found.requires or ():
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
    every = set(found.metadata.get_all("Provides-Extra") or ())
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
