"""How objects of Python's own types take over the content of their new versions."""

from __future__ import annotations

import array
import collections
import enum
import functools
import io
import logging
import operator
import random
import types
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlinfra_sdk.namespace.graft import Grafting

    Handler = Callable[[Grafting, Any], Any]

_VALUES = frozenset({type(None), bool, int, float, complex, str, bytes})


def same(left: Iterable[Any], right: Iterable[Any]) -> bool:
    """Whether both give the same objects."""
    return all(map(operator.is_, left, right))


def _same_value(a: object, b: object) -> bool:
    kind = type(a)
    if a is b or kind is not type(b) or kind not in _VALUES:
        return a is b
    return repr(a) == repr(b) if kind in (float, complex) else a == b  # -0.0, nan


# Mutable containers


def _list(work: Grafting, new: Any) -> Any:
    old = work.old(new)
    target = new if old is None else old

    def walk() -> None:
        if work.atomic(list.__iter__(new)):
            if target is not new:
                work.stores.append(lambda: list.__setitem__(target, slice(None), new))
            return
        items = work.resolve_all(list.__iter__(new))
        if target is not new or not same(items, list.__iter__(new)):
            work.stores.append(lambda: list.__setitem__(target, slice(None), items))

    work.walks.append(walk)
    work.attributes(new, target)
    return target


def _dict(work: Grafting, new: Any) -> Any:
    old = work.old(new)
    target = new if old is None else old
    base: Any = collections.OrderedDict if isinstance(new, collections.OrderedDict) else dict

    def walk() -> None:
        keys, values = list(base.keys(new)), list(base.values(new))
        plain_keys = work.atomic(keys)
        new_keys = keys if plain_keys else work.resolve_all(keys)
        new_values = values if work.atomic(values) else work.resolve_all(values)
        if target is new and same(new_keys, keys) and same(new_values, values):
            return

        def store() -> None:
            base.clear(target)
            base.update(target, zip(new_keys, new_values, strict=True))

        (work.stores if plain_keys else work.hashing_stores).append(store)

    work.walks.append(walk)
    work.attributes(new, target)
    return target


def _defaultdict(work: Grafting, new: Any) -> Any:
    target = _dict(work, new)

    def walk() -> None:
        factory = work.resolve(new.default_factory)
        work.stores.append(lambda: setattr(target, "default_factory", factory))

    work.walks.append(walk)
    return target


def _set(work: Grafting, new: Any) -> Any:
    old = work.old(new)
    target = new if old is None else old

    def walk() -> None:
        items = list(set.__iter__(new))
        plain = work.atomic(items)
        new_items = items if plain else work.resolve_all(items)
        if target is new and same(new_items, items):
            return

        def store() -> None:
            set.clear(target)
            set.update(target, new_items)

        (work.stores if plain else work.hashing_stores).append(store)

    work.walks.append(walk)
    work.attributes(new, target)
    return target


def _deque(work: Grafting, new: Any) -> Any:
    old = work.old(new)
    target = old if old is not None and old.maxlen == new.maxlen else new

    def walk() -> None:
        items = list(new)
        new_items = work.resolve_all(items)
        if target is new and same(new_items, items):
            return

        def store() -> None:
            collections.deque.clear(target)
            collections.deque.extend(target, new_items)

        work.stores.append(store)

    work.walks.append(walk)
    work.attributes(new, target)
    return target


# Immutable containers: rebuilt where a part was replaced


def _tuple(work: Grafting, new: Any) -> Any:
    old = work.old(new)
    items = new if work.atomic(tuple.__iter__(new)) else work.resolve_all(tuple.__iter__(new))
    if old is not None and len(old) == len(items) and all(map(_same_value, items, old)):
        return old
    if items is new or same(items, tuple.__iter__(new)):
        return new
    rebuilt = tuple.__new__(type(new), items)
    if hasattr(new, "__dict__"):
        rebuilt.__dict__.update(new.__dict__)
    return rebuilt


def _frozenset(work: Grafting, new: Any) -> Any:
    old = work.old(new)
    items = list(frozenset.__iter__(new))
    if work.atomic(items):
        unchanged = old is not None and len(old) == len(new) and all(map(old.__contains__, items))
        return old if unchanged else new
    resolved = work.resolve_all(items)
    if old is not None and {id(item) for item in resolved} == {id(item) for item in old}:
        return old
    return new if same(resolved, items) else frozenset.__new__(type(new), resolved)


def _method(work: Grafting, new: Any) -> Any:
    function, owner = work.resolve(new.__func__), work.resolve(new.__self__)
    for candidate in (work.old(new), new):
        if candidate is not None and same(
            (candidate.__func__, candidate.__self__), (function, owner)
        ):
            return candidate
    return types.MethodType(function, owner)


def _weakref(work: Grafting, new: Any) -> Any:
    if type(new) is not weakref.ref:
        return new
    referent = new()
    resolved = work.resolve(referent)
    return new if resolved is referent else weakref.ref(resolved, new.__callback__)


def _partial(work: Grafting, new: Any) -> Any:
    old = work.old(new)
    target = new if old is None else old

    def walk() -> None:
        _, _, state = new.__reduce__()
        resolved = tuple(work.resolve_all(state))
        work.stores.append(lambda: target.__setstate__(resolved))

    work.walks.append(walk)
    return target


# Functions


def _function(work: Grafting, new: types.FunctionType) -> Any:
    old = work.old(new)
    if old is not None and (
        old.__globals__ is not new.__globals__
        or len(old.__closure__ or ()) != len(new.__closure__ or ())
    ):
        old = None
    cells = new.__closure__ or ()
    if old is None:
        resolved = work.resolve_all(cells)
        target = new
        if not same(resolved, cells):
            target = types.FunctionType(
                new.__code__, new.__globals__, new.__name__, closure=tuple(resolved)
            )
    else:
        target = old
        for cell, old_cell in zip(cells, old.__closure__ or (), strict=True):
            if id(cell) in work.pairs:
                work.resolve(cell)
            work.targets.setdefault(id(cell), old_cell)
            work.walks.append(functools.partial(_walk_cell, work, cell, old_cell))

    def walk() -> None:
        defaults, keyword_defaults = work.resolve_all((new.__defaults__, new.__kwdefaults__))
        attributes = {name: work.resolve(value) for name, value in vars(new).items()}

        def store() -> None:
            if target.__code__ != new.__code__:
                target.__code__ = new.__code__
            target.__defaults__, target.__kwdefaults__ = defaults, keyword_defaults
            vars(target).clear()
            vars(target).update(attributes)
            for name in ("__name__", "__qualname__", "__module__", "__doc__", _ANNOTATIONS):
                setattr(target, name, getattr(new, name))

        if target is not new or not same(
            (defaults, keyword_defaults, *attributes.values()),
            (new.__defaults__, new.__kwdefaults__, *vars(new).values()),
        ):
            work.stores.append(store)

    work.walks.append(walk)
    return target


# Python 3.14 evaluates annotations lazily.
_ANNOTATIONS = "__annotate__" if hasattr(types.FunctionType, "__annotate__") else "__annotations__"


def _cell(work: Grafting, new: types.CellType) -> Any:
    old = work.old(new)
    target = new if old is None else old
    work.walks.append(lambda: _walk_cell(work, new, target))
    return target


def _walk_cell(work: Grafting, new: types.CellType, target: types.CellType) -> None:
    def clear() -> None:
        del target.cell_contents

    try:
        content = new.cell_contents
    except ValueError:  # an empty cell
        if target is not new:
            work.stores.append(clear)
        return
    resolved = work.resolve(content)
    if target is not new or resolved is not content:
        work.stores.append(lambda: setattr(target, "cell_contents", resolved))


# Instances


def _instance(work: Grafting, new: Any) -> Any:
    old = work.old(new)
    target = new if old is None else old
    work.attributes(new, target)
    return target


def _exception(work: Grafting, new: Any) -> Any:
    target = _instance(work, new)

    def walk() -> None:
        parts = (new.args, new.__cause__, new.__context__)
        args, cause, context = resolved = work.resolve_all(parts)

        def store() -> None:
            target.args = args
            target.__cause__, target.__context__ = cause, context
            target.__suppress_context__ = new.__suppress_context__

        if target is not new or not same(resolved, parts):
            work.stores.append(store)

    work.walks.append(walk)
    return target


# Objects without parts that copy their state


def _copying(copy: Callable[[Any, Any], None], check: Callable[[Any, Any], object]) -> Handler:
    """A handler that stores by ``copy(old, new)`` if ``check(old, new)`` does not fail before."""

    def handler(work: Grafting, new: Any) -> Any:
        old = work.old(new)
        target = new
        if old is not None:
            try:
                check(old, new)
            except Exception:
                old = None
        if old is not None:
            target = old
            work.stores.append(lambda: copy(old, new))
        work.attributes(new, target)
        return target

    return handler


def _check_resize(old: Any, new: Any) -> None:
    if len(old) != len(new):  # impossible while a memoryview of it exists
        old.append(0)
        old.pop()


def _check_array(old: Any, new: Any) -> None:
    if old.typecode != new.typecode:
        raise TypeError
    _check_resize(old, new)


def _copy_stream(old: Any, new: Any) -> None:
    old.__setstate__(new.__getstate__())


def _copy_items(old: Any, new: Any) -> None:
    old[:] = new


HANDLERS: dict[type, Handler | None] = {
    object: _instance,
    list: _list,
    dict: _dict,
    collections.OrderedDict: _dict,
    collections.defaultdict: _defaultdict,
    set: _set,
    collections.deque: _deque,
    tuple: _tuple,
    frozenset: _frozenset,
    types.MethodType: _method,
    types.FunctionType: _function,
    types.CellType: _cell,
    functools.partial: _partial,
    weakref.ref: _weakref,
    BaseException: _exception,
    bytearray: _copying(_copy_items, _check_resize),
    array.array: _copying(_copy_items, _check_array),
    random.Random: _copying(
        lambda old, new: old.setstate(new.getstate()), lambda old, new: new.getstate()
    ),
    io.StringIO: _copying(_copy_stream, lambda old, new: new.__getstate__()),
    io.BytesIO: _copying(_copy_stream, lambda old, new: old.write(b"")),
    # Singletons and things with a life of their own.
    type: None,
    enum.Enum: None,
    logging.Logger: None,
    types.ModuleType: None,
}
