"""``env=FILE``: the requirements that a file states, whatever its kind."""

from __future__ import annotations

import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.worker.uv import run_uv

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass
class Stated:
    """What a file asks for."""

    requirements: list[str] = field(default_factory=list)
    constraints: list[str] = field(default_factory=list)
    projects: list[Path] = field(default_factory=list)
    """Projects and archives on this disk."""
    indexes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Sentences for the user."""


def read(path: Path) -> Stated:
    """The requirements in a file. Raises :class:`RequestError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"env={path} cannot be read: {error}.", hint="Give the path of a text file."
        ) from None
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


def _gather(path: Path, text: str, stated: Stated, into: list[str], seen: set[Path]) -> None:
    seen.add(path.resolve())
    for line in _lines(text):
        option, _, value = line.replace("=", " ", 1).partition(" ")
        value = value.strip()
        if line.startswith("-"):
            if option in ("-r", "--requirement", "-c", "--constraint"):
                other = path.parent / value
                if other.resolve() not in seen:
                    try:
                        content = other.read_text(encoding="utf-8")
                    except OSError as error:
                        raise RequestError(f"{path} names {value}: {error}.") from None
                    constraints = option in ("-c", "--constraint")
                    target = stated.constraints if constraints else into
                    _gather(other, content, stated, target, seen)
            elif option in ("-e", "--editable"):
                stated.projects.append((path.parent / value).resolve())
            elif option in ("-i", "--index-url", "--extra-index-url"):
                stated.indexes.append(value)
            else:
                stated.notes.append(f"{path.name}: {option} is not passed to the machine.")
        elif _is_path(line) and (path.parent / line).exists():
            stated.projects.append((path.parent / line).resolve())
        else:
            into.append(_checked(line, path))


def _lines(text: str) -> Iterator[str]:
    """Logical lines without comments and hashes."""
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        line = re.sub(r"(^|\s)#.*", "", line)
        line = re.sub(r"\s--hash=\S+", "", line).strip()
        if line:
            yield line


def _is_path(line: str) -> bool:
    return line.startswith((".", "/")) or line.endswith((".whl", ".tar.gz", ".zip"))


def _checked(line: str, path: Path) -> str:
    try:
        return str(Requirement(line))
    except InvalidRequirement as error:
        raise RequestError(
            f"{path} asks for {line!r}, which is no requirement: {error}.", hint="Mend that line."
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
    return Stated([_checked(str(line), path) for line in project.get("dependencies", ())])


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
        _require_python(str(tomllib.loads(text).get("requires-python", "")), path)
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"{path} is not valid TOML: {error}.") from None
    arguments = ["export", "--frozen", "--no-dev", "--no-hashes", "--no-header", "--no-annotate"]
    exported = portal().call(
        run_uv(
            [*arguments, "--no-emit-project", "--quiet", "--project", str(path.parent)],
            folder=Path(tempfile.gettempdir()),
            tell=lambda text: None,
        )
    )
    return _read_requirements(path, exported)


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
        elif match := re.match(r"python\s*([=<>~!].*)", str(item)):
            _require_python(re.sub(r"^={1,2}\s*([0-9.]+).*", r"==\1.*", match[1]), path)
        elif not re.match(r"(python|pip)\b", str(item)):
            conda.append(str(item))
    if conda:
        stated.notes.append(
            f"Conda packages are not supported: of {path.name} the machine gets only what stands "
            f"below pip, and not {', '.join(conda)}."
        )
    return stated
