"""Object graphs to streams and back, with what both sides must know about them.

Large buffers stay outside of the stream. Notebook functions get the receiving namespace as their
globals; functions and classes that are bound there under their own name travel as that name;
objects that cannot leave their process are replaced by stubs.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
import threading
import types
import weakref
from collections.abc import Callable, Collection, Hashable, Sequence
from enum import Enum
from pickle import PickleBuffer
from typing import Any, cast

import msgspec
from blake3 import blake3
from cloudpickle import cloudpickle

from mlinfra_sdk.errors import NotTransferable
from mlinfra_sdk.objects import code, reducers
from mlinfra_sdk.objects.blob import BlobRef, Packed
from mlinfra_sdk.objects.extents import Extent, Memories
from mlinfra_sdk.objects.realm import Foreign, Realm, receiving, resolve
from mlinfra_sdk.objects.store import ChunkStore

PROTOCOL = 5
OUT_OF_BAND = 64 * 1024
_DEEP_STACK = 512 * 1024 * 1024

_ATOMS = frozenset(
    (int, float, complex, bool, str, bytes, type(None), type(Ellipsis), types.CodeType, Extent)
)


class Dump(msgspec.Struct, eq=False):
    """A pickled list of values and what was met on the way."""

    stream: bytes
    buffers: list[PickleBuffer]
    memo: dict[int, tuple[int, object]]
    """id of every object met: (its index, the object)."""
    owned: set[int]
    """ids of functions that are pickled by content."""
    by_reference: set[int]
    """ids of other objects that are pickled as names of globals."""
    memories: set[Hashable]
    """Memory blocks that arrays and tensors are views of."""
    names: set[str]
    """Variables that functions and methods of the graph may use."""
    attributes: set[str]
    """All names in their code."""
    definitions: set[str]
    """Variables that the graph refers to by name."""
    files: set[str]
    dropped: dict[int, str]
    """id of every object replaced by a stub: what it is."""
    keep_alive: list[object]
    _shareable: set[Hashable] | None = None

    @property
    def size(self) -> int:
        """Bytes of the stream and of all buffers."""
        return len(self.stream) + sum(buffer.raw().nbytes for buffer in self.buffers)

    def objects(self) -> dict[int, object]:
        """The objects that have an identity worth keeping, by index."""
        named = self.by_reference | self._functions_by_reference()
        return {
            index: obj
            for key, (index, obj) in self.memo.items()
            if _HAS_IDENTITY[type(obj)] and key not in named
        }

    def shareable(self) -> set[Hashable]:
        """Keys of everything whose sharing by two graphs can be observed."""
        if self._shareable is None:
            keys = {key for key, (_, obj) in self.memo.items() if _IS_MUTABLE[type(obj)]}
            keys -= self.by_reference | self._functions_by_reference()
            self._shareable = keys | self.memories
        return self._shareable

    def mutables(self) -> dict[int, object]:
        """The objects whose sharing can be observed, by index."""
        keys = self.shareable()
        return {index: obj for key, (index, obj) in self.memo.items() if key in keys}

    def _functions_by_reference(self) -> set[int]:
        functions = {key for key, (_, obj) in self.memo.items() if type(obj) is types.FunctionType}
        return functions - self.owned

    def digest(self, refs: Sequence[BlobRef]) -> bytes:
        """Digest of the content, ``refs`` being those of the buffers."""
        if not refs:
            return blake3(self.stream).digest()
        hasher = blake3(self.stream)
        hasher.update(msgspec.msgpack.encode(refs))
        return hasher.digest()

    def pack(self, store: ChunkStore, refs: Sequence[BlobRef] | None = None) -> Packed:
        """Puts the bytes into the store. ``refs`` are those of the buffers if already there."""
        if refs is None:
            refs = [store.put_buffer(buffer) for buffer in self.buffers]
        sources = list(code.cell_sources(self.files)) if self.files else []
        return Packed(store.put_buffer(self.stream), list(refs), sources)


class _ByType(dict[type, bool]):
    """A predicate of types, remembered."""

    def __init__(self, predicate: Callable[[type], bool]) -> None:
        self._predicate = predicate

    def __missing__(self, kind: type) -> bool:
        result = self._predicate(kind)
        if kind.__module__ != "__main__":  # classes of the notebook come and go
            self[kind] = result
        return result


def _has_identity(kind: type) -> bool:
    """Whether objects of this type are worth pairing with their counterparts."""
    return kind not in _ATOMS and not issubclass(kind, (type, types.ModuleType))


def _is_mutable(kind: type) -> bool:
    """Whether it matters that two graphs share an object of this type.

    Types that define both equality and a hash are taken for values (dtype, Path, datetime,
    Decimal, frozen dataclasses...), except tensors, whose equality is elementwise.
    """
    if kind in _ATOMS or kind in _VALUES:
        return False
    if issubclass(kind, (type, types.ModuleType, Enum, Foreign)):
        return False
    if kind.__hash__ is None or kind.__module__.startswith("torch.nn"):
        return True
    if kind.__name__ in ("Tensor", "Parameter") and kind.__module__.startswith("torch"):
        return True
    return kind.__eq__ == object.__eq__ or kind.__hash__ == object.__hash__


_HAS_IDENTITY = _ByType(_has_identity)
_IS_MUTABLE = _ByType(_is_mutable)

_VALUES = frozenset(
    (
        tuple,
        frozenset,
        range,
        types.BuiltinFunctionType,
        types.MethodType,
        types.MethodDescriptorType,
        types.WrapperDescriptorType,
        types.GetSetDescriptorType,
        types.MemberDescriptorType,
        property,
        staticmethod,
        classmethod,
        PickleBuffer,
    )
)


class Encoder(cloudpickle.Pickler):  # type: ignore[misc]
    """One pass over one graph."""

    def __init__(
        self,
        file: io.BytesIO,
        realm: Realm,
        inline: Collection[str],
        where: str,
        memories: Memories,
    ) -> None:
        buffers: list[PickleBuffer] = []

        def in_band(buffer: PickleBuffer) -> bool:
            if buffer.raw().nbytes < OUT_OF_BAND:
                return True
            buffers.append(buffer)
            return False

        super().__init__(file, protocol=PROTOCOL, buffer_callback=in_band)
        self.realm = realm
        self.buffers = buffers
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.definitions: set[str] = set()
        self.owned: set[int] = set()
        self.by_reference: set[int] = set()
        self.dropped: dict[int, str] = {}
        self.files: set[str] = set()
        self.filled_cells: set[int] = set()
        self.keep_alive: list[object] = []
        self.memories = memories
        self.host_copies: dict[Hashable, Any] = {}
        self._inline = inline
        self._where = where
        self._handlers: dict[type, Callable[[Encoder, Any], Any]] = {}

    def reducer_override(self, obj: object) -> Any:
        """Called by the C pickler for everything but the basic built-in types."""
        kind = type(obj)
        handler = self._handlers.get(kind)
        if handler is None:
            handler = self._handlers[kind] = _handler(kind)
        return handler(self, obj)

    def definition(self, obj: object, name: str) -> Any:
        """How to refer to a function or class that is bound under its own name, else None."""
        if name in self._inline or self.realm.ns.get(name) is not obj:
            return None
        self.definitions.add(name)
        return reducers.variable, (name,)

    def scope(self, namespace: dict[str, Any]) -> dict[str, Any]:
        """The beginning of a namespace that only the functions of the graph have."""
        names = ("__name__", "__package__", "__file__", "__path__")
        scope: dict[str, Any] = self.globals_ref.setdefault(
            id(namespace), {name: namespace[name] for name in names if name in namespace}
        )
        return scope

    def stub(self, obj: object) -> Any:
        """How to refer to an object that cannot travel."""
        kind = type(obj)
        name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
        text = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
        if self._where:
            text += f" (in {self._where})"
        self.dropped[id(obj)] = text
        return resolve, (self.realm.token(obj), text)

    def note_source(self, filename: str) -> None:
        """The graph has code from this file."""
        self.files.add(filename)


def encode(
    values: list[Any],
    realm: Realm,
    *,
    inline: Collection[str] = (),
    where: str = "",
    deep: bool = False,
) -> Dump:
    """Pickles a list of values as one graph.

    ``inline`` are the variables that must not be referred to by name because this graph defines
    them; ``where`` says to a user where the graph comes from. Raises NotTransferable. A graph that
    is too deep for the stack is tried again with a larger one (``deep``).
    """
    memories = Memories()
    while True:
        file = io.BytesIO()
        encoder = Encoder(file, realm, inline, where, memories)
        try:
            encoder.dump(values)
        except Exception as error:
            if isinstance(error.__cause__, RecursionError) and not deep:
                return _in_deep_stack(
                    lambda: encode(values, realm, inline=inline, where=where, deep=True)
                )
            cause = f"{type(error).__name__}: {error}"
            raise NotTransferable(
                f"{where or 'A value'} cannot be pickled ({cause}).",
                hint="Create it in the cell that uses it.",
            ) from error
        overlapping = memories.overlapping()
        if overlapping == memories.shared:
            break
        memories = Memories(overlapping, memories.owners())
    return Dump(
        file.getvalue(),
        encoder.buffers,
        encoder.memo.copy(),
        encoder.owned,
        encoder.by_reference,
        encoder.memories.keys,
        encoder.names,
        encoder.attributes,
        encoder.definitions,
        encoder.files,
        encoder.dropped,
        encoder.keep_alive,
    )


def _in_deep_stack(function: Callable[[], Dump]) -> Dump:
    results: list[Dump | Exception] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    size = threading.stack_size(_DEEP_STACK)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(_DEEP_STACK // 4096)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        sys.setrecursionlimit(limit)
        threading.stack_size(size)
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def decode(packed: Packed, store: ChunkStore, realm: Realm) -> tuple[list[Any], dict[int, object]]:
    """Rebuilds the list of values; also gives the objects by their index in the dump."""
    for source in packed.sources:
        code.register_source(source)
    stream = store.read(packed.stream)
    unpickler = pickle.Unpickler(
        io.BytesIO(stream), buffers=[store.map(ref) for ref in packed.buffers]
    )
    with receiving(realm):
        values = unpickler.load()
    memo = cast("dict[int, object]", unpickler.memo.copy())
    return values, {index: obj for index, obj in memo.items() if _HAS_IDENTITY[type(obj)]}


def _handler(kind: type) -> Callable[[Encoder, Any], Any]:
    """The reducer of a type."""
    if issubclass(kind, types.FunctionType):
        return code.reduce_function
    if issubclass(kind, type):
        return code.reduce_class
    if kind in _SPECIAL:
        return _SPECIAL[kind]
    if issubclass(kind, Foreign):
        return reducers.reduce_foreign
    if issubclass(kind, types.ModuleType):
        return reducers.reduce_module
    if issubclass(kind, BaseException):
        return reducers.reduce_exception
    if kind.__module__ == "numpy" and kind is sys.modules["numpy"].ndarray:
        from mlinfra_sdk.objects.reducers_numpy import reduce_array

        return reduce_array
    torch = sys.modules.get("torch")
    if torch is not None and kind in (torch.Tensor, torch.nn.Parameter):
        from mlinfra_sdk.objects.reducers_torch import reduce_tensor

        return reduce_tensor
    if torch is not None and issubclass(kind, torch.optim.Optimizer):
        from mlinfra_sdk.objects.reducers_torch import reduce_optimizer

        return reduce_optimizer
    widgets = sys.modules.get("ipywidgets.widgets.widget")
    if hasattr(widgets, "_instances") and issubclass(kind, widgets.Widget):  # type: ignore[union-attr]
        from mlinfra_sdk.objects.reducers_widgets import reduce_widget

        return reduce_widget
    if reducers.stays_home(kind):
        return Encoder.stub
    if kind.__module__.startswith("ipykernel.") and issubclass(kind, io.TextIOBase):
        return reducers.reduce_stream
    dispatched = cloudpickle.Pickler._dispatch_table.get(kind) or copyreg.dispatch_table.get(kind)
    return reducers.reduce_dispatched(dispatched) if dispatched else reducers.reduce_default


_SPECIAL: dict[type, Callable[[Encoder, Any], Any]] = {
    types.CellType: code.reduce_cell,
    types.CodeType: code.reduce_code,
    types.BuiltinFunctionType: lambda encoder, obj: NotImplemented,
    type(threading.Lock()): reducers.reduce_lock,
    type(threading.RLock()): reducers.reduce_lock,
    io.TextIOWrapper: reducers.reduce_stream,
    weakref.ref: reducers.reduce_weakref,
    weakref.WeakMethod: reducers.reduce_weakref,
    weakref.ProxyType: reducers.reduce_weak_proxy,
    weakref.CallableProxyType: reducers.reduce_weak_proxy,
    weakref.WeakKeyDictionary: reducers.reduce_weak_mapping,
    weakref.WeakValueDictionary: reducers.reduce_weak_mapping,
    **reducers.FUNCTION_WRAPPERS,
}
