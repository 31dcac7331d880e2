"""mlinfra-sdk: run Python code on a remote machine as if it were local.

>>> import mlinfra_sdk
>>> with mlinfra_sdk.Session() as session:
...     session.run("print('hello from the machine')")
...
>>> @mlinfra_sdk.remote
... def train(data): ...
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .checkpoints.checkpointer import checkpoint as checkpoint
    from .checkpoints.keep import Keep as Keep
    from .comparison import compare as compare
    from .decorator import RemoteFunction as RemoteFunction
    from .decorator import remote as remote
    from .errors import KernelDied as KernelDied
    from .errors import MlinfraError as MlinfraError
    from .errors import NotTransferable as NotTransferable
    from .errors import RemoteError as RemoteError
    from .errors import RemoteValueLost as RemoteValueLost
    from .errors import RequestError as RequestError
    from .meters import track as track
    from .namespace.remote_value import RemoteValue as RemoteValue
    from .session import Session as Session
    from .sources import data as data

_ERRORS = (
    "KernelDied",
    "MlinfraError",
    "NotTransferable",
    "RemoteError",
    "RemoteValueLost",
    "RequestError",
)
_HOME = {
    "Keep": "checkpoints.keep",
    "RemoteFunction": "decorator",
    "compare": "comparison",
    "checkpoint": "checkpoints.checkpointer",
    "data": "sources",
    "RemoteValue": "namespace.remote_value",
    "Session": "session",
    "remote": "decorator",
    "track": "meters",
    **dict.fromkeys(_ERRORS, "errors"),
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    # Importing the package alone must cost nothing: kernels and the command do it at their start.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
