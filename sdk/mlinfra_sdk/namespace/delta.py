"""The messages that carry namespace changes between a local kernel and its worker.

Everything is a :class:`msgspec.Struct` (msgpack-able). Defaults are omitted, so that an empty
delta is one byte. Payload bytes are named by digest (:meth:`Inputs.digests`,
:meth:`Outputs.digests`); the chunks must be in the receiver's store before the delta is applied.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from mlinfra_sdk.objects.blob import Packed

EXTRA = "="
"""Before the name of a value of ``WorkerNamespace.collect(extra=...)``."""
FORMER = "-"
"""Before the name of a variable whose former value was changed before it was bound anew."""


class Pairing(msgspec.Struct, frozen=True, array_like=True):
    """Which objects of a graph are objects that the receiver knows from group ``group``.

    ``runs`` is flat triples (index in this graph, index in that group's graph, length).
    """

    group: int
    runs: list[int]


class Group(msgspec.Struct, frozen=True, omit_defaults=True):
    """Variables that share objects, pickled as one graph: a list in the order of ``names``.

    ``id`` is positive if given by the client, negative if given by the worker.
    """

    id: int
    names: list[str]
    data: Packed
    pairings: list[Pairing] = []


class RemoteRef(msgspec.Struct, frozen=True, omit_defaults=True):
    """A value that stays on the worker, and what a user wants to see of it.

    ``nbytes`` is the size of its content as far as known; ``reason`` says why it cannot be fetched
    (empty: it can). ``widget`` is a widget's model id: front ends show it wherever it lives.
    """

    token: str
    type: str
    shape: str = ""
    dtype: str = ""
    nbytes: int = 0
    reason: str = ""
    widget: str = ""


class Inputs(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a worker must know before it runs a cell."""

    groups: list[Group] = []
    names: list[str] = []
    """All variables that the cell may read; the worker looks for mutations in these."""
    overwritten: dict[str, bool] = {}
    """Variables that the cell may bind or delete but does not read: whether they exist."""
    deleted: list[str] = []
    imports: list[str] = []
    """Submodules that the code reaches through their packages."""
    exports: list[tuple[str, str]] = []
    """(token, variable): values that the client could not rebuild; the worker must keep them."""
    released: list[str] = []
    """Tokens that the client no longer holds."""
    ambient: dict[str, bytes] = {}
    eager_limit: int = 0
    fresh: bool = False
    """The client knows nothing of what the worker holds."""

    def digests(self) -> list[bytes]:
        """Digests of all chunks that are referred to, each once."""
        return list(_chunks(group.data for group in self.groups))


class Outputs(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a cell changed on the worker."""

    groups: list[Group] = []
    remote: dict[str, RemoteRef] = {}
    deleted: list[str] = []
    stale: list[str] = []
    """Variables whose worker copy changed although the cell did not name them."""
    ambient: dict[str, bytes] = {}
    error: Packed | None = None
    warnings: list[str] = []

    def digests(self) -> list[bytes]:
        """Digests of all chunks that are referred to, each once."""
        return list(self.chunks())

    def chunks(self) -> dict[bytes, int]:
        """The same, with their sizes."""
        packed = [group.data for group in self.groups]
        return _chunks(packed if self.error is None else [*packed, self.error])


def _chunks(packed: Iterable[Packed]) -> dict[bytes, int]:
    return {digest: size for item in packed for digest, size in item.chunks()}
