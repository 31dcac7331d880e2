"""The package indexes that are configured here."""

from __future__ import annotations

import configparser
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

_VARIABLES = (
    "UV_INDEX",
    "UV_DEFAULT_INDEX",
    "UV_INDEX_URL",
    "UV_EXTRA_INDEX_URL",
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
)
_OPTIONS = ("index-url", "extra-index-url")
_LOCAL = (None, "localhost", "127.0.0.1", "::1")


def configured_indexes(*, credentials: bool = False, here: bool = False) -> list[str]:
    """URLs of indexes that environment variables and pip's files of settings name, for a machine to
    ask too, or for use ``here``."""
    entries = [*_of_variables(), *_of_pip()]
    return travelling(
        (it.partition("=")[2] if "=" in it.partition("://")[0] else it for it in entries),
        credentials=credentials,
        here=here,
    )


def travelling(urls: Iterable[str], *, credentials: bool = False, here: bool = False) -> list[str]:
    """Those of the indexes that a machine can be told of. Those on this host mean nothing there,
    only ``here``; those on this disk are left to uv and pip. An index that wants credentials is
    left out, unless the user lets them travel: what lies there is then got here, and sent as
    wheels."""
    found = []
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or (parts.hostname in _LOCAL and not here):
            continue
        if "@" not in parts.netloc or credentials:
            found.append(urlunsplit(parts))
    return list(dict.fromkeys(found))


def _of_variables() -> Iterator[str]:
    for name in _VARIABLES:
        yield from os.environ.get(name, "").split()


def _of_pip() -> Iterator[str]:
    """Of the files that pip reads (pip.pypa.io/en/stable/topics/configuration, 2026-11-28)."""
    home = Path.home()
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    own = os.environ.get("PIP_CONFIG_FILE", "")
    files = [Path("/etc/xdg/pip/pip.conf"), Path("/etc/pip.conf")]
    files += [home / ".pip/pip.conf", config / "pip/pip.conf"]
    files += [home / "Library/Application Support/pip/pip.conf", Path(sys.prefix) / "pip.conf"]
    if own == os.devnull:
        return
    parser = configparser.RawConfigParser()
    for file in [*files, *([Path(own)] if own else [])]:
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError):
            continue  # pip says so itself
    for option in _OPTIONS:
        yield from parser.get("global", option, fallback="").split()
