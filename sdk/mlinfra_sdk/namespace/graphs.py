"""Variables as object graphs: their digests, and which of them share objects."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from pickle import PickleBuffer
from typing import Any

import msgspec

from mlinfra_sdk.namespace.delta import EXTRA, FORMER
from mlinfra_sdk.objects.blob import BlobRef, Packed
from mlinfra_sdk.objects.codec import Dump, encode
from mlinfra_sdk.objects.realm import Realm
from mlinfra_sdk.objects.store import ChunkStore


class Root(msgspec.Struct, eq=False):
    """A variable, pickled alone."""

    name: str
    value: Any
    dump: Dump


class Graph(msgspec.Struct, eq=False):
    """Variables that share objects, pickled together: a list of their values."""

    names: list[str]
    dump: Dump


class Scanner:
    """Pickles variables for one exchange; no buffer is hashed twice.

    ``keep``: whatever is hashed is also stored, chunk by chunk while it is in the processor's
    cache. For a side that sends what the other one does not hold.
    """

    def __init__(self, realm: Realm, store: ChunkStore, *, keep: bool = False) -> None:
        self._realm = realm
        self._store = store
        self._keep = keep
        self._refs: dict[tuple[int, int], BlobRef] = {}

    def root(self, name: str, value: object) -> Root:
        """Raises NotTransferable."""
        return Root(name, value, encode([value], self._realm, inline=(name,), where=_shown(name)))

    def graph(self, roots: list[Root]) -> Graph:
        """Raises NotTransferable."""
        names = [root.name for root in roots]
        if len(roots) == 1:
            return Graph(names, roots[0].dump)
        where = ", ".join(map(_shown, names))
        values = [root.value for root in roots]
        return Graph(names, encode(values, self._realm, inline=names, where=where))

    def digest(self, dump: Dump) -> bytes:
        """Digest of the content."""
        return dump.digest([self._ref(buffer) for buffer in dump.buffers])

    def pack(self, dump: Dump) -> Packed:
        """Puts the content into the store."""
        refs = []
        for buffer in dump.buffers:
            key = _memory_key(buffer)
            ref = self._store.put_buffer(buffer, self._refs.get(key) if key else None)
            if key is not None:
                self._refs[key] = ref
            refs.append(ref)
        return dump.pack(self._store, refs)

    def moving_bytes(self, dump: Dump) -> int:
        """How many bytes are not known to be in the store."""
        return dump.size - sum(self._store.unchanged_bytes(buffer) for buffer in dump.buffers)

    def _ref(self, buffer: PickleBuffer) -> BlobRef:
        key = _memory_key(buffer)
        ref = self._refs.get(key) if key is not None else None
        if ref is None:
            store = self._store
            ref = store.put_buffer(buffer) if self._keep else store.digest_buffer(buffer)
            if key is not None:
                self._refs[key] = ref
        return ref


def _shown(name: str) -> str:
    return repr(name.lstrip(EXTRA + FORMER))


def _memory_key(buffer: PickleBuffer) -> tuple[int, int] | None:
    view = buffer.raw()
    if view.readonly:  # its address cannot be asked for
        return None
    return ctypes.addressof(ctypes.c_char.from_buffer(view)), view.nbytes


def components(roots: Collection[Root]) -> list[list[Root]]:
    """The variables in groups that share objects or need one another to be rebuilt.

    A group comes after those whose variables it refers to by name.
    """
    leader: dict[str, str] = {root.name: root.name for root in roots}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = name = leader[leader[name]]
        return name

    first_user: dict[Hashable, str] = {}
    for root in roots:
        for key in root.dump.shareable():
            leader[find(root.name)] = find(first_user.setdefault(key, root.name))
    groups: dict[str, list[Root]] = {}
    for root in roots:
        groups.setdefault(find(root.name), []).append(root)
    needs = {
        key: {find(name) for root in group for name in root.dump.definitions if name in leader}
        for key, group in groups.items()
    }
    return [[root for key in cycle for root in groups[key]] for cycle in _dependencies_first(needs)]


def _dependencies_first(needs: Mapping[str, Iterable[str]]) -> Iterator[list[str]]:
    """Strongly connected components of a graph, each after those it needs (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(key: str) -> Iterator[list[str]]:
        index[key] = low[key] = len(index)
        stack.append(key)
        for other in needs[key]:
            if other not in index:
                yield from visit(other)
                low[key] = min(low[key], low[other])
            elif other in stack:
                low[key] = min(low[key], index[other])
        if low[key] == index[key]:
            at = stack.index(key)
            cycle = stack[at:]
            del stack[at:]
            yield cycle

    for key in needs:
        if key not in index:
            yield from visit(key)


# Correspondences of indices, as flat triples (first, first of the other, length)


def to_runs(pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Compresses pairs of indices."""
    runs: list[int] = []
    for a, b in sorted(pairs):
        if runs and a == runs[-3] + runs[-1] and b == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += (a, b, 1)
    return runs


def from_runs(runs: list[int]) -> Iterator[tuple[int, int]]:
    """The pairs again."""
    for a, b, length in zip(runs[::3], runs[1::3], runs[2::3], strict=True):
        yield from zip(range(a, a + length), range(b, b + length), strict=True)
