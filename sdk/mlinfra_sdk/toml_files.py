"""The settings files: the user's ``config.toml`` and ``[tool.mlinfra]`` of a ``pyproject.toml``."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import paths
from .errors import RequestError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Table:
    """What a file says; ``origin`` names the file and the table, for messages."""

    origin: str
    values: Mapping[str, object]
    _text: str = ""
    _header: str = ""

    def line_of(self, key: str) -> str:
        """``, line N`` of a key of this table, or nothing when it is written unusually."""
        pattern = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=")
        inside = not self._header
        for number, line in enumerate(self._text.splitlines(), start=1):
            if inside and pattern.match(line):
                return f", line {number}"
            inside = inside or line.strip() == self._header
        return ""

    def below(self, name: str) -> Iterator[tuple[str, Table]]:
        """The tables in the table ``name``, such as ``targets``, by their own names."""
        tables = self.values.get(name, {})
        dotted = f"{self._header[1:-1]}.{name}".lstrip(".")
        if not isinstance(tables, dict):
            raise RequestError(
                f"{name} in {self.origin} is not a table.", hint=f"Write [{dotted}.NAME]."
            )
        for key, values in tables.items():
            header = f"[{dotted}.{key}]"
            if not isinstance(values, dict):
                raise RequestError(
                    f"{dotted}.{key} in {self.origin} is not a table.", hint=f"Write {header}."
                )
            path = self.origin.partition(" [")[0]
            yield key, Table(f"{path} {header}", values, self._text, header)


def tables(directory: Path | None = None) -> list[Table]:
    """The user's file and that of the project, which has the last word.

    ``directory`` is the notebook's (default: the working directory). Files are read again only
    when they changed, so this may be called before every cell. Raises :class:`RequestError`.
    """
    found = [_table(str(paths.config_file()), None)]
    project = _nearest_pyproject(directory or Path.cwd())
    if project is not None:
        found.append(_table(project, "mlinfra"))
    return found


def _nearest_pyproject(directory: Path) -> str | None:
    folder = os.path.abspath(directory)
    while True:
        candidate = os.path.join(folder, "pyproject.toml")
        if os.path.isfile(candidate):
            return candidate
        parent = os.path.dirname(folder)
        if parent == folder:
            return None
        folder = parent


def _table(path: str, tool: str | None) -> Table:
    try:
        info = os.stat(path)
    except OSError:
        return Table(path, {})
    return _read(path, tool, info.st_mtime_ns, info.st_size)


@functools.lru_cache(maxsize=16)
def _read(path: str, tool: str | None, _mtime: int, _size: int) -> Table:
    text = read(path)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RequestError(
            f"The settings file {path} is not valid TOML: {error}.",
            hint='Mend that line; texts and units need quotes, as in idle = "15m".',
        ) from None
    if tool is None:
        return Table(path, values, text)
    tools = values.get("tool")
    values = tools.get(tool, {}) if isinstance(tools, dict) else {}
    origin = f"{path} [tool.{tool}]"
    if not isinstance(values, dict):
        raise RequestError(
            f"{origin} is not a table.", hint=f"Write [tool.{tool}] and the keys below it."
        )
    return Table(origin, values, text, f"[tool.{tool}]")


def read(path: str) -> str:
    """What a settings file says; nothing if there is none. Raises :class:`RequestError`."""
    try:
        # Line ends as they are: what is written back has the same.
        return Path(path).read_bytes().decode("utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"The settings file {path} cannot be read: {error}.",
            hint="Mend its permissions or its encoding (UTF-8), or move it away.",
        ) from None
