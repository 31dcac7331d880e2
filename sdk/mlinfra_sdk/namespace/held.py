"""The worker's side of the variables: what it holds, and what a cell changed."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sized
from typing import TYPE_CHECKING, Any

import msgspec

from mlinfra_sdk.errors import NotTransferable, StoreError
from mlinfra_sdk.namespace import ambient
from mlinfra_sdk.namespace.delta import EXTRA, FORMER, Group, Inputs, Outputs, Pairing, RemoteRef
from mlinfra_sdk.namespace.graphs import Graph, Root, Scanner, components, to_runs
from mlinfra_sdk.objects.codec import Dump, decode, encode
from mlinfra_sdk.objects.modules import LazyModule
from mlinfra_sdk.objects.realm import Realm, Stub

if TYPE_CHECKING:
    from mlinfra_sdk.objects.blob import Packed
    from mlinfra_sdk.objects.store import ChunkStore


class _Held(msgspec.Struct, eq=False):
    """A graph that both sides know: its objects here by their index, and the reverse."""

    objects: dict[int, object]
    index_of: dict[int, int] = {}

    def __post_init__(self) -> None:
        self.index_of = {id(obj): index for index, obj in self.objects.items()}


class _Variable(msgspec.Struct, eq=False):
    """A variable whose content both sides know, and the objects that it consists of."""

    group: int
    digest: bytes
    objects: dict[int, object]


class _Cell(msgspec.Struct, eq=False):
    """The namespace as it was when the cell began.

    ``forgotten`` are variables whose values the client thinks are here, but were dropped.
    """

    names: list[str]
    values: dict[str, Any]
    forgotten: set[str]
    eager_limit: int


class _Overwritten(Stub):
    """Stands for a variable that a cell binds or deletes but does not read.

    So its old value need not be sent and can be freed, and whether it was bound can be told.
    """

    __slots__ = ()


class WorkerNamespace:
    """The variables of ``ns`` as one client knows them. Use from the thread that runs the cells.

    ``hidden()`` names variables that are not the user's; ``shared_fs``: both sides see the same
    files.
    """

    def __init__(
        self,
        ns: dict[str, Any],
        store: ChunkStore,
        *,
        hidden: Callable[[], Iterable[str]] = lambda: (),
        shared_fs: bool = False,
    ) -> None:
        self.ns = ns
        self._store = store
        self._hidden = hidden
        self._shared_fs = shared_fs
        self._realm = Realm(ns)
        self._last_group = 0
        self._groups: dict[int, _Held] = {}
        self._variables: dict[str, _Variable] = {}
        self._ambient: dict[str, bytes] = {}
        self._not_loaded: set[str] = set()
        self._cell = _Cell([], {}, set(), 0)

    # Before a cell

    def load(self, inputs: Inputs) -> list[str]:
        """Brings the namespace up to date for a cell. All chunks must be in the store.

        A value that cannot be rebuilt here is replaced by one that says so when it is used.
        Returns warnings.
        """
        self._store.check_mapped()
        if inputs.fresh:
            self._groups.clear()
            self._variables.clear()
        for token, name in inputs.exports:
            if name in self.ns:
                self._realm.hold(self.ns[name], token)
        for token in inputs.released:
            self._realm.release(token)
        for name in inputs.deleted:
            self.ns.pop(name, None)
            self._variables.pop(name, None)
        places = {name: inputs.ambient[name] for name in ambient.PLACES if name in inputs.ambient}
        warnings = ambient.write_all(places)
        for name in inputs.imports:
            with contextlib.suppress(ImportError):  # the code that needs it says so
                importlib.import_module(name)
        scanner = Scanner(self._realm, self._store)
        for group in inputs.groups:
            self._load_group(group, scanner)
        rest = {name: it for name, it in inputs.ambient.items() if name not in places}
        warnings += ambient.write_all(rest)
        if inputs.ambient or not self._ambient:
            self._ambient = ambient.read_all(self._shared_fs)
        self._start(inputs)
        return warnings

    def _load_group(self, group: Group, scanner: Scanner) -> None:
        for name in group.names:
            self._variables.pop(name, None)
        try:
            values, objects = decode(group.data, self._store, self._realm)
        except StoreError:  # the client sends it again
            raise
        except Exception as error:
            reason = f"It cannot be rebuilt on the machine ({type(error).__name__}: {error})."
            for name in group.names:
                self.ns[name] = Stub("", f"the value of {name!r}", reason)
            self._not_loaded.update(group.names)
            return
        self.ns.update(zip(group.names, values, strict=True))
        self._groups[group.id] = _Held(objects)
        for name, value in zip(group.names, values, strict=True):
            with contextlib.suppress(NotTransferable):
                self._know(group.id, scanner.root(name, value), scanner)

    def _start(self, inputs: Inputs) -> None:
        for name, value in list(self.ns.items()):
            if type(value) is LazyModule and value.__name__ in sys.modules:
                self.ns[name] = sys.modules[value.__name__]
        forgotten = set()
        for name, exists in inputs.overwritten.items():
            if self._variables.pop(name, None) is not None:
                forgotten.add(name)
            self.ns.pop(name, None)
            if exists:
                reason = "The cell does not read it before it binds or deletes it."
                self.ns[name] = _Overwritten("", f"the value of {name!r}", reason)
        names = [name for name in inputs.names if name in self.ns]
        self._cell = _Cell(names, dict(self.ns), forgotten, inputs.eager_limit)
        self._forget_unused_groups()

    def _forget_unused_groups(self) -> None:
        live = {variable.group for variable in self._variables.values()}
        self._groups = {key: held for key, held in self._groups.items() if key in live}

    # After a cell

    def collect(
        self, *, extra: Mapping[str, Any] | None = None, error: BaseException | None = None
    ) -> Outputs:
        """What changed since :meth:`load`. ``extra`` are values beside the variables (the value
        of the last expression as ``_``); they share objects with the variables as they did."""
        cell = self._cell
        hidden = frozenset(self._hidden())
        kept = {name for name, value in self.ns.items() if type(value) is _Overwritten}
        for name in kept:
            del self.ns[name]
        gone = cell.values.keys() - self.ns.keys() - kept
        deleted = {name for name in gone if name not in hidden}
        bound = self._bound(cell, hidden)
        exchange = _Exchange(self._realm, Scanner(self._realm, self._store), cell.eager_limit)
        for name, value in bound.items():
            exchange.add(name, value)
        for name, value in (extra or {}).items():
            exchange.add(EXTRA + name, value)
        known = self._known_groups(cell.names)
        stale = self._add_mutated(cell, bound.keys() | deleted, exchange) | self._not_loaded
        stale |= cell.forgotten - bound.keys() - deleted
        for name in bound.keys() | deleted:
            self._variables.pop(name, None)
        groups, warnings = self._send(exchange, cell.names, known)
        for name in (*stale, *exchange.remote):
            self._variables.pop(name, None)
        state = ambient.read_all(self._shared_fs)
        changed = {name: data for name, data in state.items() if self._ambient.get(name) != data}
        self._ambient = state
        self._not_loaded = set()
        self._cell = _Cell([], dict(self.ns), set(), 0)
        return Outputs(
            groups,
            exchange.remote,
            sorted(deleted),
            sorted(stale),
            changed,
            None if error is None else self._pack_error(error, cell.eager_limit),
            warnings,
        )

    def _bound(self, cell: _Cell, hidden: Collection[str]) -> dict[str, Any]:
        """Variables that are bound to other objects than before the cell."""
        before, missing = cell.values.get, object()
        found = [item for item in list(self.ns.items()) if item[1] is not before(item[0], missing)]
        return {name: value for name, value in found if name.isidentifier() and name not in hidden}

    def _add_mutated(self, cell: _Cell, gone: Collection[str], exchange: _Exchange) -> set[str]:
        """Adds what the cell changed inside of the variables that it may have read.

        Returns the variables that share objects with these but were not named by the cell.
        """
        sharers: set[str] = set()
        unchanged: list[Root] = []
        for name in cell.names:
            variable = self._variables.get(name)
            if variable is None:
                continue
            wire_name = FORMER + name if name in gone else name
            root = exchange.scan(wire_name, cell.values[name])
            if root is not None and self._is_unchanged(variable, root, exchange.scanner):
                if name not in gone:
                    unchanged.append(root)
                continue
            sharers |= self._sharers(variable.group if root is None else root.dump)
            if root is not None:
                exchange.roots[wire_name] = root
            elif name in gone:
                exchange.remote.pop(wire_name)
        exchange.add_memory_sharers(unchanged)
        return sharers - set(cell.names)

    @staticmethod
    def _is_unchanged(variable: _Variable, root: Root, scanner: Scanner) -> bool:
        """Whether a variable has the same content and still consists of the same objects.

        An object may have been replaced by an equal one, which others share or do not share.
        """
        if scanner.digest(root.dump) != variable.digest:
            return False
        now = root.dump.mutables()
        other = {index for index, obj in variable.objects.items() if now.get(index) is not obj}
        if not other:
            return True
        # Some are only made for pickling (by __getstate__...): those are others each time.
        again = scanner.root(root.name, root.value).dump.mutables()
        if any(again.get(index) is now.get(index) for index in other):
            return False
        for index in other:
            del variable.objects[index]
        return True

    def _sharers(self, graph: Dump | int) -> set[str]:
        """Variables that share objects with a graph or belong to a group."""
        if isinstance(graph, int):
            groups = {graph}
        else:
            groups = {
                key
                for key, held in self._groups.items()
                if not held.index_of.keys().isdisjoint(graph.memo)
            }
        return {name for name, variable in self._variables.items() if variable.group in groups}

    def _send(
        self, exchange: _Exchange, current: Iterable[str], known: Mapping[int, _Held]
    ) -> tuple[list[Group], list[str]]:
        """Groups of what is small enough, with warnings; the rest is noted as remote."""
        groups: list[Group] = []
        warnings: list[str] = []
        context = exchange.context(self.ns, current)
        for component in components([*exchange.roots.values(), *context]):
            roots = [root for root in component if root not in context]
            if not roots:
                continue
            graph = exchange.sendable(roots, len(roots) < len(component))
            if graph is None:
                continue
            warnings += (f"{text} stays on the machine." for text in graph.dump.dropped.values())
            try:
                packed = exchange.scanner.pack(graph.dump)
            except StoreError as error:
                exchange.leave(roots)
                what = ", ".join(repr(name) for name in graph.names if name.isidentifier())
                warnings.append(f"{what or 'The result'}: stays on the machine. {error}")
                continue
            self._last_group -= 1
            pairings = _pairings(graph.dump, known)
            groups.append(Group(self._last_group, graph.names, packed, pairings))
            self._hold(self._last_group, roots, graph.dump, exchange.scanner)
        return groups, warnings

    def _known_groups(self, names: Iterable[str]) -> dict[int, _Held]:
        variables = (self._variables.get(name) for name in names)
        ids = {variable.group for variable in variables if variable is not None}
        return {key: self._groups[key] for key in sorted(ids)}

    def _hold(self, group: int, roots: list[Root], dump: Dump, scanner: Scanner) -> None:
        """From now on the client knows these objects."""
        self._groups[group] = _Held(dump.objects())
        for root in roots:
            if root.name.isidentifier():
                self._know(group, root, scanner)

    def _know(self, group: int, root: Root, scanner: Scanner) -> None:
        digest = scanner.digest(root.dump)
        self._variables[root.name] = _Variable(group, digest, root.dump.mutables())

    def _pack_error(self, error: BaseException, limit: int) -> Packed | None:
        try:
            dump = encode([error], self._realm, where="the exception")
        except NotTransferable:
            return None
        return dump.pack(self._store) if dump.size <= limit else None

    # On request

    def fetch(self, token: str) -> Outputs:
        """The value of a RemoteValue, whatever its size.

        Raises NotTransferable if it cannot be pickled, KeyError if there is none.
        """
        value = self._realm.resolve(token)
        if value is None:
            raise KeyError(token)
        scanner = Scanner(self._realm, self._store)
        dump = scanner.root(EXTRA, value).dump
        names = [name for name, held in self.ns.items() if held is value and name.isidentifier()]
        self._last_group -= 1
        packed = scanner.pack(dump)
        self._hold(self._last_group, [scanner.root(name, value) for name in names], dump, scanner)
        return Outputs([Group(self._last_group, [EXTRA], packed)])

    def values(self, names: Iterable[str]) -> Outputs:
        """Current values of variables, whatever their size. Raises KeyError for unknown ones."""
        exchange = _Exchange(self._realm, Scanner(self._realm, self._store), None)
        for name in names:
            exchange.add(name, self.ns[name], keep_held=False)
        groups, warnings = self._send(exchange, (), {})
        return Outputs(groups, exchange.remote, warnings=warnings)


class _Exchange:
    """What is about to be sent: ``roots`` by value, ``remote`` by reference (both by name)."""

    def __init__(self, realm: Realm, scanner: Scanner, limit: int | None) -> None:
        self.realm = realm
        self.scanner = scanner
        self.limit = limit
        self.roots: dict[str, Root] = {}
        self.remote: dict[str, RemoteRef] = {}

    def add(self, name: str, value: Any, *, keep_held: bool = True) -> None:
        """A variable is to be sent, unless the client already has a reference to its value."""
        if keep_held and id(value) in self.realm.held:
            self.keep(name, value)
            return
        root = self.scan(name, value)
        if root is not None:
            self.roots[name] = root

    def add_memory_sharers(self, unchanged: list[Root]) -> None:
        """Adds unchanged variables whose memory is shared by arrays or tensors that are sent, so
        that these can become views of it."""
        waiting = [root for root in unchanged if root.dump.memories]
        memories = set().union(*(root.dump.memories for root in self.roots.values()))
        while found := [root for root in waiting if not memories.isdisjoint(root.dump.memories)]:
            for root in found:
                waiting.remove(root)
                self.roots[root.name] = root
                memories |= root.dump.memories

    def scan(self, name: str, value: Any) -> Root | None:
        """The pickled variable. If the value cannot travel it is noted as remote."""
        try:
            root = self.scanner.root(name, value)
        except NotTransferable as error:
            self.keep(name, value, reason=error.message)
            return None
        if id(value) in root.dump.dropped:
            text = root.dump.dropped[id(value)].removesuffix(f" (in {name!r})")
            self.keep(name, value, reason=f"{text} cannot leave the process that made it")
            return None
        return root

    def keep(self, name: str, value: Any, nbytes: int = 0, reason: str = "") -> None:
        """The client gets a reference."""
        self.remote[name] = describe(value, self.realm.hold(value), nbytes, reason)

    def context(self, ns: Mapping[str, Any], names: Iterable[str]) -> list[Root]:
        """Variables of the cell that the client only has references to: what shares objects with
        them must stay with them."""
        if not any(root.dump.shareable() for root in self.roots.values()):
            return []
        found = []
        for name in names:
            if name in ns and name not in self.remote and id(ns[name]) in self.realm.held:
                with contextlib.suppress(NotTransferable):
                    found.append(self.scanner.root(name, ns[name]))
        return found

    def sendable(self, roots: list[Root], bound_to_remote: bool) -> Graph | None:
        """The graph of the roots, or None if they are to stay here as references."""
        try:
            graph = self.scanner.graph(roots)
            nbytes = self.scanner.moving_bytes(graph.dump)
            reason = ""
        except NotTransferable as error:
            graph, nbytes, reason = None, 0, error.message
        small = self.limit is None or nbytes <= self.limit
        if graph is not None and small and not bound_to_remote:
            return graph
        self.leave(roots, nbytes, reason)
        return None

    def leave(self, roots: list[Root], nbytes: int = 0, reason: str = "") -> None:
        """The client gets references to all of these."""
        for root in roots:
            if not root.name.startswith(FORMER):
                self.keep(root.name, root.value, nbytes, reason)


def _pairings(dump: Dump, groups: Mapping[int, _Held]) -> list[Pairing]:
    """Which objects of the graph the client knows (an object may be in several groups)."""
    pairings = []
    index_of = {id(obj): index for index, obj in dump.objects().items()} if groups else {}
    for group_id, held in groups.items():
        common = held.index_of.keys() & index_of.keys()
        if common:
            pairs = ((index_of[key], held.index_of[key]) for key in common)
            pairings.append(Pairing(group_id, to_runs(pairs)))
    return pairings


def describe(value: Any, token: str, nbytes: int, reason: str) -> RemoteRef:
    """What a user wants to see of a value that stays here."""
    kind = type(value)
    module = kind.__module__.split(".")[0]
    name = kind.__qualname__ if module in ("builtins", "__main__") else f"{module}.{kind.__name__}"
    shape = dtype = ""
    with contextlib.suppress(Exception):  # properties of user classes may raise anything
        if isinstance(value, Sized) and kind.__module__ == "builtins":
            shape = str(len(value))
        elif hasattr(value, "shape"):
            shape = " x ".join(map(str, value.shape))
        if hasattr(value, "dtype"):
            dtype = str(value.dtype)
        if hasattr(value, "nbytes"):
            nbytes = int(value.nbytes)
    ipywidgets = sys.modules.get("ipywidgets")
    widget = ""
    if ipywidgets is not None and isinstance(value, ipywidgets.Widget):
        widget = str(value.model_id or "")
    return RemoteRef(token, name, shape, dtype, nbytes, reason, widget)
