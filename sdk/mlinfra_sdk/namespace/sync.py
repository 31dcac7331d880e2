"""Two-sided namespace state: what the worker holds, what must move before and after a cell.

The local namespace is the truth. Client: :class:`LocalNamespace`; worker:
:class:`WorkerNamespace`; messages: :mod:`mlinfra_sdk.namespace.delta`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from mlinfra_sdk.namespace.delta import Group, Inputs, Outputs

if TYPE_CHECKING:
    from mlinfra_sdk.namespace.analysis import CellNames
    from mlinfra_sdk.objects.store import ChunkStore

EAGER_LIMIT = 64 * 1024 * 1024


class Report(msgspec.Struct):
    """What :meth:`LocalNamespace.apply` did."""

    changed: list[str] = []
    deleted: list[str] = []
    remote: list[str] = []
    extra: dict[str, Any] = {}
    error: BaseException | None = None
    bytes_received: int = 0
    warnings: list[str] = []


class LocalNamespace:
    """The local side of one (kernel, machine) pair. Use from the kernel's main thread."""

    def __init__(
        self,
        ns: dict[str, Any],
        store: ChunkStore,
        *,
        fetch: Callable[[str], Outputs] | None = None,
        hidden: Callable[[], Iterable[str]] = lambda: (),
        eager_limit: int = EAGER_LIMIT,
        shared_fs: bool = False,
    ) -> None:
        """``fetch(token)`` runs :meth:`WorkerNamespace.fetch` over there and returns when all
        chunks are in ``store``; ``hidden()`` names variables that are not the user's."""
        raise NotImplementedError

    def prepare(self, cell: CellNames) -> Inputs:
        """What must be sent before the cell. Records are advanced by :meth:`apply` only."""
        raise NotImplementedError

    def prepare_values(self, values: Mapping[str, Any]) -> Inputs:
        """Like :meth:`prepare` for values to be bound over there under the given names."""
        raise NotImplementedError

    def apply(self, outputs: Outputs) -> Report:
        """Takes over what the cell changed. All chunks must be in the store."""
        raise NotImplementedError

    def forget(self, reason: str = "its kernel is gone") -> None:
        """The worker's namespace is gone: drops all records, RemoteValues become lost."""
        raise NotImplementedError


class WorkerNamespace:
    """The worker's side. Use from the thread that runs the cells."""

    def __init__(
        self,
        ns: dict[str, Any],
        store: ChunkStore,
        *,
        hidden: Callable[[], Iterable[str]] = lambda: (),
        shared_fs: bool = False,
    ) -> None:
        raise NotImplementedError

    def load(self, inputs: Inputs) -> None:
        """Brings the namespace up to date for a cell. All chunks must be in the store."""
        raise NotImplementedError

    def collect(
        self, *, extra: Mapping[str, Any] | None = None, error: BaseException | None = None
    ) -> Outputs:
        """What changed since :meth:`load`. ``extra`` are values beside the variables (the value
        of the last expression as ``_``); they share objects with the variables as they did."""
        raise NotImplementedError

    def fetch(self, token: str) -> Outputs:
        """The value of a RemoteValue, whatever its size; to be passed on unchanged."""
        raise NotImplementedError

    def values(self, names: Iterable[str]) -> Outputs:
        """Current values of variables, whatever their size (an explicit pull)."""
        raise NotImplementedError


__all__ = [
    "EAGER_LIMIT",
    "Group",
    "Inputs",
    "LocalNamespace",
    "Outputs",
    "Report",
    "WorkerNamespace",
]
