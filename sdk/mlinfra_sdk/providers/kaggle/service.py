"""What Kaggle is asked, through its own client (``helper.py``)."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mlinfra_sdk.errors import ProviderError
from mlinfra_sdk.providers import tools

LOG_IN = (
    "Make an API token at https://www.kaggle.com/settings and put it into ~/.kaggle/access_token, "
    "or into KAGGLE_API_TOKEN."
)
ADDRESS = "MLINFRA_KAGGLE_URL"
"""The environment variable that names another service, for tests."""
TOOL = tools.Tool(
    "kaggle",
    ("kaggle==2.2.5", "six"),  # six it needs and does not ask for
    (3, 11),
    Path(__file__).with_name("helper.py"),
)
_QUIET = 300.0
"""Seconds without a word after which the connection is taken to be dead: Kaggle itself cuts one
that idles after about 180."""
_VARIABLES = ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME")
_FILES = ("access_token", "access_token.txt", "kaggle.json")


class Quota(msgspec.Struct, frozen=True):
    """GPU time of the week in seconds, and when it begins anew (ISO)."""

    used: float
    total: float
    renewed: str

    def __str__(self) -> str:
        left = max(self.total - self.used, 0.0) / 3600
        again = f", {self.total / 3600:.1f} again from {self.renewed[:16]}" if self.renewed else ""
        return f"{left:.1f} hours of GPU are left this week{again}"


class State(msgspec.Struct, frozen=True):
    """Of a pushed run: the client's word for it, and why it failed."""

    status: str
    failure: str

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self.status in ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")


class Fetched(msgspec.Struct, frozen=True):
    """Whether there was such a file; if not, the end of the log."""

    found: bool
    log: str


def has_login() -> bool:
    """Whether there is anything that the client could log in with."""
    folder = Path.home() / ".kaggle"
    return any(os.environ.get(name) for name in _VARIABLES) or any(
        (folder / name).exists() for name in _FILES
    )


async def quota() -> Quota:
    """What the account has left."""
    found: Quota = await _ask("quota", Quota)
    return found


async def push(
    title: str, text: str, *, shape: str, seconds: int, datasets: Sequence[str], internet: bool
) -> str:
    """Have a script run, for so many seconds at most; gives the name of the account."""
    values = {"title": title, "text": text, "shape": shape, "seconds": seconds}
    user: str = await _ask("push", str, **values, datasets=list(datasets), internet=internet)
    return user


async def upload(title: str, folder: Path) -> str:
    """Make a private dataset of a folder's files, to which a file that describes it is added, and
    wait until runs can have it; gives its address."""
    address: str = await _ask("upload", str, title=title, folder=str(folder))
    return address


async def state(user: str, title: str) -> State:
    """How far it is."""
    found: State = await _ask("status", State, user=user, title=title)
    return found


async def fetch(user: str, title: str, file: str, folder: Path) -> Fetched:
    """Download one of its output files."""
    values = {"user": user, "title": title, "file": file, "folder": str(folder)}
    found: Fetched = await _ask("fetch", Fetched, **values)
    return found


async def follow(user: str, title: str, take: Callable[[str], Awaitable[None]]) -> None:
    """Give ``take`` what it prints, from the beginning on, in whatever pieces; returns at its end,
    or raises when the connection breaks."""
    request = {"call": "log", "address": _address(), "user": user, "title": title}
    await tools.listen(TOOL, request, take, _QUIET)


async def delete(user: str, title: str) -> None:
    """Remove it with all that it has left; what still runs ends."""
    await _ask("delete", type(None), user=user, title=title)


async def drop(title: str) -> None:
    """Remove a dataset, or what has become of one whose upload was cancelled."""
    await _ask("drop", type(None), title=title)


async def _ask(call: str, kind: Any, **values: Any) -> Any:
    if not has_login():
        raise ProviderError("There is no login for Kaggle here.", hint=LOG_IN)
    request = {"call": call, "address": _address(), **values}
    try:
        return msgspec.convert(await tools.ask(TOOL, request, {}), kind)
    except msgspec.ValidationError as error:
        raise ProviderError(f"Kaggle did not answer {call} as expected: {error}.") from None


def _address() -> str:
    return os.environ.get(ADDRESS, "")
