"""What a kernel on a machine is told of checkpoints, and what it is asked for.

Elsewhere nobody listens, and all checkpoints are where they are made.
"""

from __future__ import annotations

from collections.abc import Callable

from mlinfra_sdk.checkpoints.keep import Keep
from mlinfra_sdk.checkpoints.manifest import Manifest
from mlinfra_sdk.checkpoints.store import CheckpointStore

Saved = Callable[[Manifest, Keep], None]
Wanted = Callable[[CheckpointStore, str], None]

_saved: list[Saved] = []
_wanted: list[Wanted] = []
_again = False


def connect(on_saved: Saved, on_wanted: Wanted) -> None:
    """Call ``on_saved`` with each checkpoint that is safe on this machine, in the thread that wrote
    it, and ``on_wanted`` before one of a name is looked for: it may bring a newer one here."""
    _saved.append(on_saved)
    _wanted.append(on_wanted)


def saved(manifest: Manifest, keep: Keep) -> None:
    """A checkpoint has been made; ``keep`` says which ones stay."""
    for tell in _saved:
        tell(manifest, keep)


def wanted(store: CheckpointStore, name: str) -> None:
    """The newest checkpoint of a name is going to be looked for in ``store``."""
    for ask in _wanted:
        ask(store, name)


def rerun(again: bool) -> None:
    """Whether what runs now is a run that was cut off: then it also goes on from the checkpoint of
    a loop that had come to its end."""
    global _again
    _again = again


def again() -> bool:
    """See :func:`rerun`."""
    return _again
