"""The package indexes that are configured here."""

from __future__ import annotations

import os
from collections.abc import Iterable
from urllib.parse import urlsplit, urlunsplit

_VARIABLES = (
    "UV_INDEX",
    "UV_DEFAULT_INDEX",
    "UV_INDEX_URL",
    "UV_EXTRA_INDEX_URL",
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
)


def configured_indexes(*, credentials: bool = False) -> list[str]:
    """URLs of indexes that environment variables name, for a machine to ask too."""
    entries = [entry for name in _VARIABLES for entry in os.environ.get(name, "").split()]
    return travelling(
        (it.partition("=")[2] if "=" in it.partition("://")[0] else it for it in entries),
        credentials=credentials,
    )


def travelling(urls: Iterable[str], *, credentials: bool = False) -> list[str]:
    """Those of the indexes that a machine can be told of. Those on this disk or this host mean
    nothing there. An index that wants credentials is left out, unless the user lets them travel:
    what lies there is then got here, and sent as wheels."""
    found = []
    for url in urls:
        parts = urlsplit(url)
        local = parts.hostname in (None, "localhost", "127.0.0.1", "::1")
        if parts.scheme not in ("http", "https") or local:
            continue
        if "@" not in parts.netloc or credentials:
            found.append(urlunsplit(parts))
    return list(dict.fromkeys(found))
