"""The local side of the variables that a notebook shares with one machine.

The local namespace is the truth. For every variable that the worker holds, a record says which
content it holds; what differs is sent before a cell, what the cell changed is taken over after it.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec

from mlinfra_sdk.errors import MlinfraError, NotTransferable
from mlinfra_sdk.namespace import ambient
from mlinfra_sdk.namespace.delta import EXTRA, FORMER, Group, Inputs, Outputs, RemoteRef
from mlinfra_sdk.namespace.graft import graft
from mlinfra_sdk.namespace.graphs import Root, Scanner, components, from_runs
from mlinfra_sdk.namespace.records import (
    Arrived,
    Exchange,
    GroupRecord,
    KnownGroups,
    Record,
    group_record,
)
from mlinfra_sdk.namespace.remote_value import RemoteValue
from mlinfra_sdk.namespace.views import pair_views
from mlinfra_sdk.objects.codec import decode
from mlinfra_sdk.objects.modules import loaded_submodules
from mlinfra_sdk.objects.realm import Foreign, Realm, Stub

if TYPE_CHECKING:
    from mlinfra_sdk.namespace.analysis import CellNames
    from mlinfra_sdk.objects.store import ChunkStore

EAGER_LIMIT = 64 * 1024 * 1024

# Names that IPython maintains but a cell may well want to read.
_HISTORY = re.compile(r"_{1,3}|_i{1,3}|_i?\d+|_[io]h|_dh|In|Out")


class Report(msgspec.Struct):
    """What :meth:`LocalNamespace.apply` did."""

    changed: list[str] = []
    deleted: list[str] = []
    remote: list[str] = []
    """Variables that are RemoteValues now."""
    extra: dict[str, Any] = {}
    error: BaseException | None = None
    warnings: list[str] = []


class LocalNamespace:
    """The variables of ``ns`` as one worker knows them. Use from the thread that runs the cells.

    ``fetch(token)`` must run :meth:`WorkerNamespace.fetch` over there and return when all chunks
    are in ``store``; ``hidden()`` names variables that are not the user's; values of more than
    ``eager_limit`` bytes stay on the worker; ``shared_fs``: both sides see the same files;
    without ``takes_ambient`` what runs do to state outside of variables stays over there.
    """

    def __init__(
        self,
        ns: dict[str, Any],
        store: ChunkStore,
        *,
        fetch: Callable[[str], Outputs] | None = None,
        hidden: Callable[[], Iterable[str]] = lambda: (),
        eager_limit: int = EAGER_LIMIT,
        shared_fs: bool = False,
        takes_ambient: bool = True,
    ) -> None:
        self.ns = ns
        self.eager_limit = eager_limit
        self._store = store
        self._fetch = fetch
        self._hidden = hidden
        self._shared_fs = shared_fs
        self._realm = Realm(ns)
        self._next_group = 1
        self._exchange: Exchange | None = None
        self._records: dict[str, Record] = {}
        self._groups: dict[int, GroupRecord] = {}
        self._there: set[str] = set()  # variables that the worker has, whatever they hold
        self._ambient: dict[str, bytes] = {}
        self._takes_ambient = takes_ambient
        self._fresh = True
        self._remote_values: weakref.WeakValueDictionary[str, RemoteValue]
        self._remote_values = weakref.WeakValueDictionary()
        self._released: list[str] = []
        self._exports: list[tuple[str, str]] = []

    # Before a cell

    def prepare(self, cell: CellNames, code: str = "") -> Inputs:
        """What must be sent before the cell.

        ``code`` is the cell's text, in which submodules are looked for. What is recorded of the
        worker only advances with :meth:`apply`; a prepared cell whose outputs are not applied
        makes everything be sent again.
        """
        hidden = self._hidden_names()
        if cell.everything:
            wanted = [name for name in list(self.ns) if name not in hidden]
        else:
            wanted = [
                name
                for name in sorted(cell.reads)
                if name in self.ns and (name not in hidden or _HISTORY.fullmatch(name))
            ]
        inputs = self._prepare(wanted, {}, hidden, code)
        overwritten = (cell.binds | cell.deletes).difference(inputs.names, hidden)
        return msgspec.structs.replace(
            inputs, overwritten={name: name in self.ns for name in sorted(overwritten)}
        )

    def prepare_values(self, values: Mapping[str, Any]) -> Inputs:
        """Like :meth:`prepare`, for values to be bound over there under the given names."""
        return self._prepare(list(values), values, self._hidden_names(), "")

    def _hidden_names(self) -> frozenset[str]:
        return frozenset(self._hidden())

    def _prepare(
        self,
        wanted: list[str],
        values: Mapping[str, Any],
        hidden: frozenset[str],
        code: str,
    ) -> Inputs:
        if self._exchange is not None:  # no one knows what the worker holds now
            self._forget_records()
        scanner = Scanner(self._realm, self._store, keep=True)
        roots = self._closure(scanner, wanted, values, hidden)
        deleted = sorted(name for name in self._there if name not in self.ns and name not in values)
        exchange = Exchange(roots, {}, {}, deleted, len(self._exports), len(self._released))
        groups = []
        used_families: set[int] = set()
        resent: set[str] = set()
        for component in components(roots.values()):
            digests = {root.name: scanner.digest(root.dump) for root in component}
            needs = set().union(*(root.dump.definitions for root in component))
            if self._in_sync(component, digests, scanner, used_families) and not needs & resent:
                continue
            graph = scanner.graph(component)
            group = Group(self._next_group, graph.names, scanner.pack(graph.dump))
            self._next_group += 1
            groups.append(group)
            # A class is updated in place over there, a function is replaced.
            resent |= {root.name for root in component if not isinstance(root.value, type)}
            digest = scanner.digest(graph.dump)
            ids = {index: key for key, (index, _) in graph.dump.memo.items()}
            exchange.groups[group.id] = group_record(component, digest, ids, group.id)
            for name in graph.names:
                exchange.records[name] = Record(digests[name], group.id)
        self._exchange = exchange
        state = ambient.read_all(self._shared_fs)
        exchange.ambient.update(state)
        return Inputs(
            groups,
            list(roots),
            deleted=deleted,
            imports=_submodules(roots.values(), code),
            exports=list(self._exports),
            released=list(self._released),
            ambient={name: data for name, data in state.items() if self._ambient.get(name) != data},
            eager_limit=self.eager_limit,
            fresh=self._fresh,
        )

    def _closure(
        self,
        scanner: Scanner,
        wanted: list[str],
        values: Mapping[str, Any],
        hidden: frozenset[str],
    ) -> dict[str, Root]:
        """The wanted variables and all that they need, pickled singly."""
        roots: dict[str, Root] = {}
        waiting = list(reversed(wanted))
        while waiting:
            name = waiting.pop()
            if name in roots:
                continue
            value = values[name] if name in values else self.ns[name]
            try:
                root = scanner.root(name, value)
            except NotTransferable as error:
                text = f"the value of {name!r}"
                stub = Stub(self._realm.token(value), text, error.message)
                root = scanner.root(name, stub)
            roots[name] = root
            waiting += sorted(
                other
                for other in root.dump.names | root.dump.definitions
                if other in self.ns and other not in roots and other not in hidden
            )
        return roots

    def _in_sync(
        self,
        component: list[Root],
        digests: dict[str, bytes],
        scanner: Scanner,
        used_families: set[int],
    ) -> bool:
        """Whether the worker holds just these variables with just this sharing."""
        records = [self._records.get(root.name) for root in component]
        group_ids = {record.group if record else 0 for record in records}
        group_id = group_ids.pop()
        if group_ids or not group_id:
            return False
        known = self._groups[group_id]
        if known.family in used_families:  # shares objects with another component, but not here
            return False
        used_families.add(known.family)
        for root, record in zip(component, records, strict=True):
            if record is None or record.digest != digests[root.name]:
                return False
        if len(component) == 1:
            return True
        graph = scanner.graph(sorted(component, key=lambda root: known.names.index(root.name)))
        return tuple(graph.names) == known.names and scanner.digest(graph.dump) == known.digest

    # After a cell

    def apply(self, outputs: Outputs) -> Report:
        """Takes over what the cell changed. All chunks must be in the store.

        What cannot be rebuilt here becomes a RemoteValue that says why. After an exception
        (Ctrl-C) the worker is taken to hold nothing of what was being applied.
        """
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            self._commit(exchange)
        roots = exchange.roots if exchange is not None else {}
        known = self._known_groups(roots)
        touched = [name for group in outputs.groups for name in group.names]
        for name in (*touched, *outputs.remote, *outputs.deleted, *outputs.stale):
            self._records.pop(name, None)
        ambient_then, self._ambient = self._ambient, {}
        report = Report(warnings=list(outputs.warnings))
        arrived: list[Arrived] = []
        self._realm.arriving = {}
        try:
            for group in outputs.groups:
                try:
                    rebuilt = self._rebuild(group, roots, known)
                except Exception as error:
                    self._keep_remote(group, error, report)
                else:
                    arrived.append(rebuilt)
                    self._realm.arriving.update(rebuilt.values)
            report.error = self._rebuild_error(outputs)
        finally:
            self._realm.arriving = {}
        for rebuilt in arrived:
            for name, value in rebuilt.values.items():
                self._bind(name, value, report)
        for name, ref in outputs.remote.items():
            self._bind(name, self._remote_value(name, ref), report)
        for name in outputs.deleted:
            self.ns.pop(name, None)
            self._there.discard(name)
            report.deleted.append(name)
        self._record(arrived, outputs.remote)
        if not self._takes_ambient:
            self._ambient = {}
        elif outputs.ambient or exchange is None:
            report.warnings += ambient.write_all(outputs.ambient)
            self._ambient = ambient.read_all(self._shared_fs)
        else:
            self._ambient = {**ambient_then, **exchange.ambient}
        return report

    def _commit(self, exchange: Exchange) -> None:
        """The worker has loaded what was prepared."""
        self._fresh = False
        self._records.update(exchange.records)
        self._groups.update(exchange.groups)
        self._there = self._there.union(exchange.records).difference(exchange.deleted)
        for name in exchange.deleted:
            self._records.pop(name, None)
        del self._exports[: exchange.exports]
        del self._released[: exchange.released]

    def _known_groups(self, names: Iterable[str]) -> KnownGroups:
        known: KnownGroups = {}
        for name in names:
            record = self._records.get(name)
            if record is not None:
                runs = self._groups[record.group].runs.get(name, [])
                known.setdefault(record.group, {})[name] = runs
        return known

    def _rebuild(self, group: Group, roots: dict[str, Root], known: KnownGroups) -> Arrived:
        """The values of a group, old objects having taken over what belongs to them."""
        values, objects = decode(group.data, self._store, self._realm)
        pairs: dict[int, object] = {}
        linked: set[int] = set()
        cache: dict[str, dict[int, object]] = {}
        for pairing in group.pairings:
            variables = known.get(pairing.group, {})
            old = self._objects_of_group(variables, roots, cache)
            shareable = set().union(*(roots[name].dump.shareable() for name in variables))
            for index, old_index in from_runs(pairing.runs):
                if index in objects and old_index in old:
                    pairs[id(objects[index])] = old[old_index]
                    if id(old[old_index]) in shareable:
                        linked.add(pairing.group)
        graph = dict(zip(group.names, values, strict=True))
        if pairs:
            pair_views(objects.values(), pairs)
            # Classes and widgets are updated while they are rebuilt; their content is grafted.
            states = self._realm.states
            graft({"states": [state for _, _, state in states], "values": graph}, pairs)
            for apply, obj, state in states:
                apply(obj, state)
        ids = {index: id(pairs.get(id(obj), obj)) for index, obj in objects.items()}
        return Arrived(group.id, graph, ids, linked)

    @staticmethod
    def _objects_of_group(
        group: Mapping[str, list[int]],
        roots: dict[str, Root],
        cache: dict[str, dict[int, object]],
    ) -> dict[int, object]:
        """The local objects of a group that the worker holds, by index."""
        found: dict[int, object] = {}
        for name, runs in group.items():
            if name not in cache:
                cache[name] = roots[name].dump.objects()
            own = cache[name]
            for index, own_index in from_runs(runs):
                obj = own.get(own_index)
                if obj is not None and not isinstance(obj, Foreign):
                    found[index] = obj
        return found

    def _rebuild_error(self, outputs: Outputs) -> BaseException | None:
        if outputs.error is None:
            return None
        try:
            (error,), _ = decode(outputs.error, self._store, self._realm)
        except Exception:
            return None
        return error if isinstance(error, BaseException) else None

    def _bind(self, name: str, value: Any, report: Report) -> None:
        if name.startswith(EXTRA):
            report.extra[name[1:]] = value
        elif not name.startswith(FORMER):
            self.ns[name] = value
            self._there.add(name)
            (report.remote if type(value) is RemoteValue else report.changed).append(name)

    def _keep_remote(self, group: Group, error: Exception, report: Report) -> None:
        """The group cannot be rebuilt here: its variables stay over there."""
        cause = f"not rebuilt here ({type(error).__name__}: {error})"
        for name in group.names:
            if name.startswith(FORMER):
                continue
            token = f"{self._realm.id}:{group.id}:{name}"
            self._exports.append((token, name))
            ref = RemoteRef(token, "object", reason=cause)
            self._bind(name, self._remote_value(name, ref), report)
        names = ", ".join(repr(name) for name in group.names if name.isidentifier())
        if names:
            report.warnings.append(f"{names}: {cause}; stays on the machine.")

    def _record(
        self,
        arrived: list[Arrived],
        remote: Mapping[str, RemoteRef],
    ) -> None:
        """From now on the worker is known to hold what has just arrived from it."""
        scanner = Scanner(self._realm, self._store)
        for rebuilt in arrived:
            names = [name for name in rebuilt.values if name.isidentifier()]
            try:
                roots = [scanner.root(name, rebuilt.values[name]) for name in names]
                graph = scanner.graph(roots) if roots else None
            except NotTransferable:
                continue
            if graph is None:
                continue
            digest = scanner.digest(graph.dump)
            group_id = rebuilt.group
            self._join(rebuilt.linked, group_id)
            self._groups[group_id] = group_record(roots, digest, rebuilt.ids, group_id)
            for root in roots:
                self._records[root.name] = Record(scanner.digest(root.dump), group_id)
        for name in remote:
            if name.isidentifier():
                digest = scanner.digest(scanner.root(name, self.ns[name]).dump)
                self._records[name] = Record(digest, self._remote_group(name))
        live = {record.group for record in self._records.values()}
        self._groups = {key: group for key, group in self._groups.items() if key in live}

    def _join(self, linked: set[int], family: int) -> None:
        """The families of these groups become one."""
        families = {self._groups[key].family for key in linked if key in self._groups}
        for key, group in self._groups.items():
            if group.family in families:
                self._groups[key] = msgspec.structs.replace(group, family=family)

    def _remote_group(self, name: str) -> int:
        """A group of one variable that stays over there."""
        group_id, self._next_group = self._next_group, self._next_group + 1
        self._groups[group_id] = GroupRecord((name,), b"", {}, group_id)
        return group_id

    # Values that stay over there

    def _remote_value(self, name: str, ref: RemoteRef) -> RemoteValue:
        value = self._remote_values.get(ref.token)
        if value is not None:
            return value
        value = RemoteValue(name.lstrip(EXTRA), ref, self._pull)
        self._remote_values[ref.token] = value
        weakref.finalize(value, self._released.append, ref.token).atexit = False
        return value

    def _pull(self, remote: RemoteValue) -> Any:
        """Fetches a value; all variables that hold the RemoteValue hold the value afterwards."""
        if self._fetch is None:
            raise MlinfraError(
                f"{remote!r} cannot be fetched here.", hint="Use the session that made it."
            )
        outputs = self._fetch(remote._mlinfra_token)
        (group,) = outputs.groups
        (value,), objects = decode(group.data, self._store, self._realm)
        names = [name for name, held in list(self.ns.items()) if held is remote]
        for name in names:
            self.ns[name] = value
        known = [name for name in names if name in self._records]
        if known and self._exchange is None:
            ids = {index: id(obj) for index, obj in objects.items()}
            self._record([Arrived(group.id, dict.fromkeys(known, value), ids, set())], {})
        return value

    def met(self) -> Iterator[object]:
        """Every object that :meth:`prepare` has met for the cell that is about to run."""
        if self._exchange is not None:
            for root in self._exchange.roots.values():
                for _, obj in root.dump.memo.values():
                    yield obj

    def known(self) -> list[str]:
        """Variables that the worker is known to hold."""
        return [name for name in self._records if name in self.ns]

    def abandon(self) -> None:
        """What was prepared runs on by itself: its outputs come by :meth:`adopt`, if ever."""
        self._forget_records()

    def adopt(self, outputs: Outputs) -> Report:
        """Takes over what a run changed that was not followed from its beginning: by name, since
        the variables may have gone on here. All chunks must be in the store."""
        self._forget_records()
        try:
            return self.apply(outputs)
        finally:
            self._forget_records()

    def forget(self, reason: str = "its kernel is gone") -> None:
        """The worker's namespace is gone: everything is sent again, RemoteValues are lost."""
        self._forget_records()
        self._there.clear()
        self._exports.clear()
        self._released.clear()
        for value in list(self._remote_values.values()):
            value._mlinfra_lose(reason)
        self._remote_values.clear()

    def _forget_records(self) -> None:
        if self._exchange is not None:
            self._there.update(self._exchange.records)
        self._exchange = None
        self._records.clear()
        self._groups.clear()
        self._ambient = {}
        self._fresh = True


def _submodules(roots: Iterable[Root], code: str) -> list[str]:
    """Loaded submodules that the code or the functions can reach through a package variable."""
    identifiers = set(re.findall(r"[^\W\d]\w*", code))
    packages = []
    for root in roots:
        identifiers |= root.dump.attributes
        if isinstance(root.value, ModuleType) and hasattr(root.value, "__path__"):
            packages.append(root.value.__name__)
    return loaded_submodules(packages, identifiers)
