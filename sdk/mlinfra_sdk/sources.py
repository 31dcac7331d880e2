"""What ``data=`` names, and where code finds it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from mlinfra_sdk.errors import RequestError

VARIABLE = "MLINFRA_DATA"
"""Set in kernels on a machine: the folder that has each dataset by its name."""

EXTRAS = {
    "s3": ("s3", "s3fs"),
    "gs": ("gs", "gcsfs"),
    "gcs": ("gs", "gcsfs"),
    "http": ("http", "aiohttp"),
    "https": ("http", "aiohttp"),
    "hf": ("hf", "huggingface_hub"),
}
"""Of each kind of URL the extra of mlinfra-sdk that it needs, and what that installs beside
fsspec."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Source(msgspec.Struct, frozen=True):
    """One dataset: a ``location`` (a path here, or a URL) and the name it goes by."""

    name: str
    location: str

    @property
    def is_url(self) -> bool:
        return "://" in self.location

    def __str__(self) -> str:
        named = self.name != _name_of(self.location)
        return f"{self.name}={self.location}" if named else self.location


def parse(text: str) -> tuple[Source, ...]:
    """Sources as they are written, with commas between them, each a location or ``NAME=LOCATION``.
    Raises ValueError."""
    sources = tuple(_parse(part.strip()) for part in text.split(",") if part.strip())
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError("two datasets have the same name; write NAME=LOCATION for one of them")
    return sources


def show(sources: tuple[Source, ...]) -> str:
    """The inverse of :func:`parse`."""
    return ",".join(map(str, sources))


def _parse(text: str) -> Source:
    name, equals, location = text.partition("=")
    if not equals or _NAME.fullmatch(name) is None:
        name, location = _name_of(text), text
    if _NAME.fullmatch(name) is None:
        raise ValueError(text)
    if "://" in location:
        parts = urlsplit(location)
        if parts.scheme not in EXTRAS or "::" in location:
            raise ValueError(text)
        if parts.username or parts.password:
            raise ValueError("a URL in a notebook must not hold a password")
    return Source(name, location)


def _name_of(location: str) -> str:
    path = location
    if "://" in location:
        parts = urlsplit(location)
        path = parts.path if parts.path.strip("/") else parts.netloc
    elif set(location) <= set("./~"):
        path = str(Path(location).expanduser().resolve())
    return path.rstrip("/").rpartition("/")[2]


def inside(sources: tuple[Source, ...], root: Path) -> list[str]:
    """Those local folders that lie in the folder ``root``, as paths below it: the workspace does
    not carry them, and on the machine they are found under the same relative paths."""
    found = []
    for source in sources:
        if not source.is_url:
            path = os.path.relpath(local_folder(source, root), root)
            if path != "." and path.split(os.sep)[0] != os.pardir:
                found.append(path)
    return found


def local_folder(source: Source, root: Path) -> Path:
    """The folder of a local dataset, symbolic links in it not being followed."""
    return Path(os.path.normpath(root / Path(source.location).expanduser()))


def data(name: str) -> Path:
    """The folder (or the one file) of the dataset ``name`` of ``data=``; for code that runs on a
    machine. ``name`` is the last part of its path or URL, unless it was given another one."""
    folder = os.environ.get(VARIABLE, "")
    known = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    if not folder or name not in known:
        raise RequestError(
            f"There is no dataset {name!r} here.",
            hint=f"Known: {', '.join(known)}." if known else "Name it by data= of the cell.",
        )
    return Path(folder, name).resolve()
