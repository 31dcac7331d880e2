"""``env=FILE``: the requirements that a file states, whatever its kind."""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.worker.uv import redacted, run_uv

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


# As pip has them: `-rbase.txt`, `-r base.txt`, `--requirement=base.txt`.
_OPTION = re.compile(r"(--[a-z][a-z-]*|-[a-zA-Z])\s*=?\s*(.*)")
_URL = re.compile(r"[a-z][a-z0-9+.-]*:/", re.IGNORECASE)
_LOCAL_URL = re.compile(r"([a-z]+\+)?file:", re.IGNORECASE)
_PYPI = "https://pypi.org/simple"
_ANY = SpecifierSet()
_VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)\}")


@dataclass(frozen=True)
class Project:
    """A project or archive on this disk."""

    path: Path
    extras: str = ""
    """Such as ``[dev]``."""
    marker: str = ""

    def requirement(self, wheel: str, url: str) -> str:
        """How its wheel, which has this file name and lies at this URL, is asked for."""
        name = canonicalize_name(wheel.partition("-")[0])
        return f"{name}{self.extras} @ {url}" + (f" ; {self.marker}" if self.marker else "")


@dataclass
class Stated:
    """What a file asks for."""

    requirements: list[str] = field(default_factory=list)
    constraints: list[str] = field(default_factory=list)
    projects: list[Project] = field(default_factory=list)
    indexes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences for the user."""


def read(path: Path) -> Stated:
    """The requirements in a file. Raises :class:`RequestError`."""
    text = _content(path, f"env={path} cannot be read")
    reader: Callable[[Path, str], Stated]
    if path.name == "uv.lock":
        reader = _read_lock
    elif path.suffix == ".toml":
        reader = _read_pyproject
    elif path.suffix in (".yml", ".yaml"):
        reader = _read_conda
    elif path.suffix in (".txt", ".in"):
        reader = _read_requirements
    else:
        raise RequestError(
            f"env={path} is of no kind that is known.",
            hint="Known: requirements.txt, pyproject.toml, uv.lock, environment.yml, none, mirror.",
        )
    return reader(path, text)


def _read_requirements(path: Path, text: str) -> Stated:
    stated = Stated()
    _gather(path, text, stated, stated.requirements, set())
    return stated


def _content(path: Path, complaint: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RequestError(f"{complaint}: {error}.", hint="Give the path of a text file.") from None
    except UnicodeDecodeError:
        raise RequestError(
            f"{complaint}: it is not text in UTF-8.",
            hint="Save it as UTF-8; editors on Windows may have written UTF-16.",
        ) from None


def _gather(path: Path, text: str, stated: Stated, into: list[str], seen: set[Path]) -> None:
    seen.add(path.resolve())
    for line in _lines(text):
        match = _OPTION.fullmatch(line)
        if match is None:
            _require(line, path, stated, into)
            continue
        option, value = match[1], match[2].strip("'\"")
        if option in ("-r", "--requirement", "-c", "--constraint"):
            constraints = option in ("-c", "--constraint")
            target = stated.constraints if constraints else into
            if _URL.match(value):
                raise RequestError(
                    f"{path} names {redacted(value)}, which is not on this disk.",
                    hint="Download it, and name the copy in that line.",
                )
            other = path.parent / value
            if other.resolve() not in seen:
                _gather(other, _content(other, f"{path} names {value}"), stated, target, seen)
        elif option in ("-e", "--editable"):
            _require(value, path, stated, into, path_for_sure=True)
        elif option in ("-i", "--index-url", "--extra-index-url"):
            stated.indexes.append(value)
        else:
            stated.notes.append(f"{path.name}: {option} is not passed to the machine.")


def _lines(text: str) -> Iterator[str]:
    """Logical lines without comments and hashes, and with variables as pip expands them."""
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        line = re.sub(r"(^|\s)#.*", "", line)
        line = re.sub(r"\s--hash=\S+", "", line).strip()
        if line:
            yield _VARIABLE.sub(lambda it: os.environ.get(it[1]) or it[0], line)


def _require(
    line: str, path: Path, stated: Stated, into: list[str], *, path_for_sure: bool = False
) -> None:
    """Take what one line asks for: a requirement, a URL without a name, or a path."""
    if _URL.match(line):
        url, _, marker = re.sub(r"\s+;\s*", "\n", line).partition("\n")
        if _LOCAL_URL.match(url):
            stated.projects.append(_project(url, "", marker, path))
        else:
            into.append(_named(url, marker, path))
    elif "://" not in line and (path_for_sure or _is_path(line)):
        match = re.fullmatch(r"(.+?)(\[[^]]*\])?(?:\s*;\s*(.*))?", line)
        assert match is not None
        stated.projects.append(_project(match[1], match[2] or "", match[3] or "", path))
    else:
        requirement = _parsed(line, path)
        if requirement.url and _is_local(requirement.url):
            extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
            marker = str(requirement.marker or "")
            stated.projects.append(_project(requirement.url, extras, marker, path))
        else:
            into.append(str(requirement))


def _named(url: str, marker: str, path: Path) -> str:
    """A URL as a requirement: uv wants the name that pip takes from ``#egg=`` in front."""
    head, _, fragment = url.partition("#")
    parts = dict(it.partition("=")[::2] for it in fragment.split("&") if it)
    name = parts.pop("egg", "")
    if parts:
        head += "#" + "&".join(f"{key}={value}" for key, value in parts.items())
    tail = f" ; {marker}" if marker else ""
    return str(_parsed(f"{name} @ {head}{tail}", path)) if name else head + tail


def _is_path(line: str) -> bool:
    path = re.sub(r"(\[[^]]*\])?(\s*;.*)?$", "", line)
    archive = path.endswith((".whl", ".tar.gz", ".zip")) and " @ " not in path
    return path.startswith((".", "/")) or archive


def _is_local(url: str) -> bool:
    return _LOCAL_URL.match(url) is not None or not _URL.match(url)


def _project(place: str, extras: str, marker: str, path: Path) -> Project:
    """A project at a path, or a URL of this disk, that a line of the file names."""
    if _URL.match(place):
        parts = urlsplit(place)
        if parts.scheme != "file" or parts.fragment:
            raise RequestError(
                f"{path} asks for {redacted(place)}, which the machine cannot reach.",
                hint="Name the folder of the project itself in that line.",
            )
        place = url2pathname(unquote(parts.path))
    elif place.startswith("file:"):
        place = place.removeprefix("file:")
    found = (path.parent / place).resolve()
    if not found.exists():
        raise RequestError(
            f"{path} asks for {place}, which is not there: {found}.",
            hint="Mend that line; paths are relative to the folder of the file.",
        )
    return Project(found, extras, marker)


def _parsed(line: str, path: Path) -> Requirement:
    try:
        return Requirement(line)
    except InvalidRequirement as error:
        raise RequestError(
            f"{path} asks for {redacted(line)!r}, which is no requirement: {redacted(str(error))}.",
            hint="Mend that line.",
        ) from None


def _read_pyproject(path: Path, text: str) -> Stated:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"{path} is not valid TOML: {error}.") from None
    project = table.get("project")
    if not isinstance(project, dict):
        raise RequestError(
            f"{path} has no [project] table.",
            hint="Other tools' tables are not read; export a requirements.txt from them.",
        )
    _require_python(str(project.get("requires-python", "")), path)
    if "dependencies" in project.get("dynamic", ()):
        raise RequestError(
            f"The dependencies in {path} are dynamic.", hint="Export a requirements.txt."
        )
    uv = table.get("tool", {}).get("uv", {})
    sources = {canonicalize_name(name): it for name, it in uv.get("sources", {}).items()}
    indexes = [it for it in uv.get("index", ()) if "url" in it]
    named = {it["name"]: str(it["url"]) for it in indexes if "name" in it}
    stated = Stated()
    for line in map(str, project.get("dependencies", ())):
        requirement = _parsed(line, path)
        source = sources.get(canonicalize_name(requirement.name))
        if isinstance(source, dict) and source.keys() == {"index"} and source["index"] in named:
            stated.indexes.append(named[source["index"]])
        elif source is not None:
            requirement.url, requirement.specifier = _source(requirement, source, path), _ANY
            line = str(requirement)
        _require(line, path, stated, stated.requirements)
    # An index that one package has to come from is asked before the others.
    stated.indexes += [str(it["url"]) for it in indexes if not it.get("explicit")]
    stated.indexes = list(dict.fromkeys(stated.indexes))
    return stated


def _source(requirement: Requirement, source: Any, path: Path) -> str:
    """The URL that a table of ``[tool.uv.sources]`` stands for."""
    match source:
        case {"path": place, **rest} if rest.keys() <= {"editable"}:
            return (path.parent / str(place)).resolve().as_uri()
        case {"git": url, **rest} if rest.keys() <= {"rev", "tag", "branch", "subdirectory"}:
            version = next((rest[it] for it in ("rev", "tag", "branch") if it in rest), "")
            folder = rest.get("subdirectory", "")
            return (
                f"git+{str(url).removeprefix('git+')}"
                + (f"@{version}" if version else "")
                + (f"#subdirectory={folder}" if folder else "")
            )
        case {"url": url, **rest} if not rest:
            return str(url)
    raise RequestError(
        f"{path} takes {requirement.name} from a place in [tool.uv.sources] that is not read here.",
        hint="Give the uv.lock beside it: `uv lock` makes it.",
    )


def _require_python(specifier: str, path: Path) -> None:
    here = platform.python_version()
    try:
        fits = SpecifierSet(specifier).contains(here, prereleases=True)
    except InvalidSpecifier:
        fits = True
    if not fits:
        raise RequestError(
            f"{path} is for Python {specifier}, this process has {here}: objects travel between "
            "equal minor versions only.",
            hint="Use a kernel of that version here.",
        )


def _read_lock(path: Path, text: str) -> Stated:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"{path} is not valid TOML: {error}.") from None
    _require_python(str(table.get("requires-python", "")), path)
    arguments = ["export", "--frozen", "--no-dev", "--no-hashes", "--no-header", "--no-annotate"]
    exported = portal().call(
        run_uv(
            [*arguments, "--no-emit-project", "--quiet", "--project", str(path.parent)],
            folder=Path(tempfile.gettempdir()),
            tell=lambda text: None,
        )
    )
    stated = _read_requirements(path, exported)
    registries = [it.get("source", {}).get("registry", "") for it in table.get("package", ())]
    stated.indexes = [it for it in dict.fromkeys(registries) if it and it != _PYPI]
    return stated


def _read_conda(path: Path, text: str) -> Stated:
    try:
        import yaml
    except ImportError:
        raise RequestError(
            f"Reading {path} needs the package pyyaml.", hint="Install it: pip install pyyaml"
        ) from None
    try:
        content: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RequestError(f"{path} is not valid YAML: {error}.") from None
    dependencies = content.get("dependencies") if isinstance(content, dict) else None
    if not isinstance(dependencies, list):
        raise RequestError(f"{path} has no list of dependencies.")
    stated = Stated()
    conda = []
    for item in dependencies:
        if isinstance(item, dict):
            lines = "\n".join(map(str, item.get("pip") or ()))
            _gather(path, lines, stated, stated.requirements, set())
        elif match := re.fullmatch(r"(?:[^\s:]+::)?(python|pip)(?![\w.-])\s*(.*)", str(item)):
            if match[1] == "python":
                # Of a single version, with or without a build, the minor one counts.
                single = re.match(r"=*\s*(\d+(?:\.\d+)?)[\w.*=\s]*$", match[2])
                _require_python(f"=={single[1]}.*" if single else match[2], path)
        else:
            conda.append(str(item))
    if conda:
        stated.notes.append(
            f"Conda packages are not supported: of {path.name} the machine gets only what stands "
            f"below pip, and not {', '.join(conda)}."
        )
    return stated
