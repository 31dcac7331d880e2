"""Functions and classes that no module can be asked for: those of the notebook."""

from __future__ import annotations

import dis
import importlib
import linecache
import sys
import types
import typing
from collections.abc import Iterator
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cloudpickle import cloudpickle

from mlinfra_sdk.objects.blob import Source
from mlinfra_sdk.objects.realm import current_realm

if TYPE_CHECKING:
    from mlinfra_sdk.objects.codec import Encoder

_GLOBAL_OPS = frozenset(
    dis.opmap[name]
    for name in (
        "LOAD_GLOBAL",
        "LOAD_NAME",
        "LOAD_FROM_DICT_OR_GLOBALS",
        "STORE_GLOBAL",
        "DELETE_GLOBAL",
    )
    if name in dis.opmap
)


@lru_cache(maxsize=4096)
def global_names(code: types.CodeType) -> frozenset[str]:
    """Names that the code and all code nested in it look up in its globals (or builtins)."""
    names = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opcode in _GLOBAL_OPS
    }
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= global_names(constant)
    return frozenset(names)


@lru_cache(maxsize=4096)
def all_names(code: types.CodeType) -> frozenset[str]:
    """Names of globals and attributes in the code and all code nested in it."""
    nested = (all_names(item) for item in code.co_consts if isinstance(item, types.CodeType))
    return frozenset(code.co_names).union(*nested)


# Functions


def reduce_function(encoder: Encoder, function: types.FunctionType) -> Any:
    """A function by its code; where its globals are the user's namespace or those of a module,
    they become the same namespace over there; else what it uses of them goes with it."""
    scope: str | dict[str, Any] | None = None
    used: dict[str, Any] = {}
    if function.__globals__ is encoder.realm.ns:
        named = encoder.definition(function, function.__name__)
        if named is not None:
            return named
        encoder.names |= global_names(function.__code__)
        encoder.attributes |= all_names(function.__code__)
        encoder.note_source(function.__code__.co_filename)
    elif cloudpickle._should_pickle_by_reference(function):
        return NotImplemented
    else:
        module = sys.modules.get(str(function.__globals__.get("__name__")))
        if getattr(module, "__dict__", None) is function.__globals__:
            scope = function.__globals__["__name__"]
        else:
            scope = encoder.scope(function.__globals__)
            names = global_names(function.__code__) & function.__globals__.keys()
            used = {name: function.__globals__[name] for name in sorted(names)}
    encoder.owned.add(id(function))
    cells = function.__closure__
    state = _function_state(encoder, function)
    if used:
        state["__globals__"] = used
    return make_function, (function.__code__, scope, cells), state, None, None, set_function


def _function_state(encoder: Encoder, function: types.FunctionType) -> dict[str, Any]:
    # Copies of strings and dicts: the stream must not depend on what the interpreter interned.
    state: dict[str, Any] = {
        "__name__": "".join(function.__name__),
        "__qualname__": "".join(function.__qualname__),
        "__module__": function.__module__,
    }
    for name in ("__doc__", "__defaults__", "__kwdefaults__", "__type_params__"):
        value = getattr(function, name, None)
        if value:
            state[name] = value
    try:
        annotations = function.__annotations__
    except Exception:  # deferred annotations that cannot be evaluated here
        annotations = {}
    if annotations:
        state["__annotations__"] = annotations
    if function.__dict__:
        state["__dict__"] = {"".join(key): value for key, value in function.__dict__.items()}
    filled = []
    for cell in function.__closure__ or ():
        # Cells may be shared by functions and may hold the function itself: they travel empty
        # and are filled by the first function that has them.
        if id(cell) in encoder.filled_cells:
            continue
        encoder.filled_cells.add(id(cell))
        try:
            filled.append((cell, cell.cell_contents))
        except ValueError:
            continue
    if filled:
        state["cells"] = filled
    return state


def make_function(
    code: types.CodeType,
    scope: str | dict[str, Any] | None,
    cells: tuple[types.CellType, ...] | None,
) -> types.FunctionType:
    """A function in the receiving namespace, in a module's, or in one of its own."""
    if scope is None:
        scope = current_realm().ns
    elif isinstance(scope, str):
        scope = importlib.import_module(scope).__dict__
    return types.FunctionType(code, scope, None, None, cells)


def set_function(function: types.FunctionType, state: dict[str, Any]) -> None:
    """Fills a function made by :func:`make_function`."""
    for cell, value in state.pop("cells", ()):
        cell.cell_contents = value
    function.__globals__.update(state.pop("__globals__", {}))
    function.__dict__.update(state.pop("__dict__", {}))
    for name, value in state.items():
        setattr(function, name, value)


def reduce_code(encoder: Encoder, code: types.CodeType) -> Any:
    """A code object with the name of its file, by which tracebacks find its lines (cloudpickle
    leaves it out since 3.1.3)."""
    maker, arguments = cloudpickle._code_reduce(code)
    # A copy: whether the name is an object of its own must not depend on string interning.
    return make_code, (maker, arguments, "".join(code.co_filename))


def make_code(maker: Any, arguments: tuple[Any, ...], filename: str) -> types.CodeType:
    """The code object that :func:`reduce_code` took apart."""
    code: types.CodeType = maker(*arguments).replace(co_filename=filename)
    return code


def reduce_cell(encoder: Encoder, cell: types.CellType) -> Any:
    """A closure cell, empty if its function fills it."""
    if id(cell) in encoder.filled_cells:
        return types.CellType, ()
    encoder.filled_cells.add(id(cell))
    try:
        return types.CellType, (), cell.cell_contents, None, None, set_cell
    except ValueError:
        return types.CellType, ()


def set_cell(cell: types.CellType, value: object) -> None:
    """Fills a closure cell."""
    cell.cell_contents = value


# Classes


def reduce_class(encoder: Encoder, cls: type) -> Any:
    """A class by reference, by its name in the namespace, or by its content."""
    reduced = cloudpickle._class_reduce(cls)
    if reduced is NotImplemented or len(reduced) == 2:
        return reduced
    named = encoder.definition(cls, cls.__name__)
    if named is not None:
        return named
    maker, arguments, (attributes, _), *_ = reduced
    for value in attributes.values():
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(function, types.FunctionType):
            encoder.note_source(function.__code__.co_filename)
            break
    is_enum = maker is cloudpickle._make_skeleton_enum
    attributes.pop("__slotnames__", None)  # pickle's own cache
    if not is_enum and "__slots__" in attributes and typing.NamedTuple not in arguments[2]:
        # Slots must be there when the class is made; their descriptors follow from them.
        arguments[3]["__slots__"] = attributes.pop("__slots__")
        for name, value in list(attributes.items()):
            if isinstance(value, types.MemberDescriptorType):
                del attributes[name]
    return make_class, (is_enum, arguments), attributes, None, None, set_class


def make_class(is_enum: bool, arguments: tuple[Any, ...]) -> Any:
    """The class that is known under the tracker id, or a new skeleton of it."""
    tracker = arguments[5] if is_enum else arguments[4]
    known = cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.get(tracker)
    if known is not None:
        return known
    if is_enum:
        return cloudpickle._make_skeleton_enum(*arguments)
    metaclass, name, bases, attributes, *_ = arguments
    skeleton = _skeleton(metaclass, name, bases, attributes)
    return cloudpickle._lookup_class_or_track(tracker, skeleton)


def _skeleton(
    metaclass: Any, name: str, bases: tuple[Any, ...], attributes: dict[str, Any]
) -> type:
    """A class without the hooks that the notebook's own metaclass and bases have already run when
    the class was defined. Those of libraries do run: they have never seen it in this process."""
    resolved = types.resolve_bases(bases)
    maker = next(kind for kind in metaclass.__mro__ if not _is_dynamic(kind))
    namespace = maker.__prepare__(name, resolved)
    namespace.update({sys.intern(key): value for key, value in attributes.items()})
    if resolved is not bases:
        namespace["__orig_bases__"] = bases
    hooked = {
        kind: kind.__dict__["__init_subclass__"]
        for base in resolved
        for kind in base.__mro__
        if "__init_subclass__" in kind.__dict__ and _is_dynamic(kind)
    }
    try:
        for kind in hooked:
            type.__delattr__(kind, "__init_subclass__")
        made: type = maker.__new__(metaclass, name, resolved, namespace)
        maker.__init__(made, name, resolved, namespace)
    finally:
        for kind, hook in hooked.items():
            type.__setattr__(kind, "__init_subclass__", hook)
    return made


def _is_dynamic(kind: type) -> bool:
    return not cloudpickle._should_pickle_by_reference(kind)


def set_class(cls: type, attributes: dict[str, Any]) -> None:
    """Gives a class these attributes and no others of its own."""
    current_realm().states.append((apply_class_state, cls, attributes))
    apply_class_state(cls, attributes)


def apply_class_state(cls: type, attributes: dict[str, Any]) -> None:
    """Sets the attributes and removes others that only pickled classes can have."""
    if not issubclass(cls, Enum):
        own = cloudpickle._class_getstate(cls)[0]
        for name in own.keys() - attributes.keys() - {"_abc_impl"}:
            special = name.startswith("__") and name.endswith("__")
            if not special and not isinstance(own[name], types.MemberDescriptorType):
                delattr(cls, name)
    cloudpickle._class_setstate(cls, (attributes, {}))


# Sources of notebook cells


def cell_sources(filenames: set[str]) -> Iterator[Source]:
    """Texts of those files that only exist as notebook cells."""
    counts = _execution_counts()
    for filename in sorted(filenames):
        entry = linecache.cache.get(filename)
        if entry is not None and len(entry) == 4 and entry[1] is None:
            yield Source(filename, "".join(entry[2]), (counts or {}).get(filename))


def register_source(source: Source) -> None:
    """Makes tracebacks and ``inspect.getsource`` know a cell of the other side."""
    lines = source.text.splitlines(keepends=True)
    linecache.cache[source.filename] = (len(source.text), None, lines, source.filename)
    counts = _execution_counts()
    if counts is not None and source.count is not None:
        counts[source.filename] = source.count


def _execution_counts() -> dict[str, int] | None:
    """IPython's own table of cell numbers, where there is an IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(getattr(shell, "compile", None), "_filename_map", None)
