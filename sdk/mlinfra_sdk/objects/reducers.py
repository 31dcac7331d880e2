"""How single kinds of objects travel, and what they become over there."""

from __future__ import annotations

import functools
import sys
import threading
import types
import typing
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlinfra_sdk.objects import tracebacks
from mlinfra_sdk.objects.modules import LazyModule, module_by_name
from mlinfra_sdk.objects.realm import Foreign, current_realm

if TYPE_CHECKING:
    from mlinfra_sdk.objects.codec import Encoder

# Would be copied by pickle, but a copy could not do what the original does.
_HOME = (
    ("threading", "Thread"),
    ("subprocess", "Popen"),
    ("tempfile", "_TemporaryFileWrapper"),
    ("concurrent.futures", "Executor"),
    ("concurrent.futures", "Future"),
    ("multiprocessing.process", "BaseProcess"),
    ("asyncio", "AbstractEventLoop"),
    ("selectors", "BaseSelector"),
    ("zmq", "Socket"),
)


def stays_home(kind: type) -> bool:
    """Whether objects of this type can never travel."""
    for module, name in _HOME:
        base = getattr(sys.modules.get(module), name, None)
        if isinstance(base, type) and issubclass(kind, base):
            return True
    return False


# Anything


def reduce_default(encoder: Encoder, obj: object) -> Any:
    """As the object itself says; if that fails it cannot travel."""
    shell = sys.modules.get("IPython.core.interactiveshell")
    if shell is not None and isinstance(obj, shell.InteractiveShell):
        return current_shell, ()
    return _tried(encoder, obj, lambda: obj.__reduce_ex__(5))


def reduce_dispatched(reducer: Callable[[Any], Any]) -> Callable[[Encoder, Any], Any]:
    """As a reducer that is registered for the type says."""
    return lambda encoder, obj: _tried(encoder, obj, lambda: reducer(obj))


def _tried(encoder: Encoder, obj: object, reduce: Callable[[], Any]) -> Any:
    try:
        reduced = reduce()
    except (RecursionError, MemoryError):
        raise
    except Exception:
        return encoder.stub(obj)
    if isinstance(reduced, str):
        encoder.by_reference.add(id(obj))
        module = getattr(obj, "__module__", None)
        if module == encoder.realm.ns.get("__name__", "__main__"):
            # A global of the notebook: only its name can stand for it.
            return encoder.definition(obj, reduced) or encoder.stub(obj)
    elif not isinstance(reduced, tuple) or not 2 <= len(reduced) <= 6:
        return encoder.stub(obj)
    return reduced


def current_shell() -> Any:
    """The receiving side's IPython shell."""
    return sys.modules["IPython"].get_ipython()


def variable(name: str) -> Any:
    """The receiving side's variable."""
    return current_realm().variable(name)


# What stays in its process


def reduce_foreign(encoder: Encoder, obj: Foreign) -> Any:
    """A stand-in: by the token of what it stands for, or as the value that it has got."""
    return obj._mlinfra_reduce()


def reduce_lock(encoder: Encoder, lock: Any) -> Any:
    """Locks arrive unlocked; the original is found again when it returns."""
    token = encoder.realm.origins.get(lock) or encoder.realm.token(lock)
    return make_lock, (token, type(lock) is not _LOCK)


def make_lock(token: str, reentrant: bool) -> Any:
    """The original lock or a fresh one."""
    realm = current_realm()
    original = realm.resolve(token)
    if original is not None:
        return original
    lock = threading.RLock() if reentrant else threading.Lock()
    realm.origins[lock] = token
    return lock


_LOCK = type(threading.Lock())


def reduce_stream(encoder: Encoder, stream: object) -> Any:
    """The standard streams are those of the other side; other open files stay."""
    for name in ("stdin", "stdout", "stderr"):
        if stream is getattr(sys, name) or stream is getattr(sys, f"__{name}__"):
            return getattr, (sys, name)
    return encoder.stub(stream)


# Modules, weak references, wrappers, exceptions


def reduce_module(encoder: Encoder, module: types.ModuleType) -> Any:
    """By name if it can be imported, else by content."""
    name = module.__name__
    if name in sys.modules or type(module) is LazyModule:
        return module_by_name, (name,)
    state = {key: value for key, value in vars(module).items() if key != "__builtins__"}
    return types.ModuleType, (name,), state


def reduce_weakref(encoder: Encoder, ref: weakref.ref[Any]) -> Any:
    """A weak reference to the same object, or a dead one."""
    target = ref()
    return (dead_reference, ()) if target is None else (type(ref), (target,))


def reduce_weak_proxy(encoder: Encoder, proxy: Any) -> Any:
    """A proxy of the same object (which its bound methods know)."""
    try:
        return weakref.proxy, (proxy.__repr__.__self__,)
    except ReferenceError:
        return encoder.stub(proxy)


def dead_reference() -> weakref.ref[Any]:
    """A weak reference whose object is gone."""
    return weakref.ref(type("Gone", (), {})())


def reduce_weak_mapping(encoder: Encoder, mapping: Any) -> Any:
    """By its present items."""
    return type(mapping), (list(mapping.items()),)


def _reduce_cached_function(encoder: Encoder, wrapper: Any) -> Any:
    """A ``functools.lru_cache``, empty."""
    importable = sys.modules.get(wrapper.__module__)
    if (
        importable is not None
        and vars(importable) is not encoder.realm.ns
        and getattr(importable, wrapper.__qualname__, None) is wrapper
    ):
        return wrapper.__reduce__()
    named = encoder.definition(wrapper, wrapper.__name__)
    if named is not None:
        return named
    parameters = wrapper.cache_parameters()
    return (
        make_cached_function,
        (wrapper.__wrapped__, parameters["maxsize"], parameters["typed"]),
        {key: value for key, value in vars(wrapper).items() if key != "__wrapped__"},
    )


def make_cached_function(function: Any, maxsize: int | None, typed: bool) -> Any:
    """A function with an empty cache."""
    return functools.lru_cache(maxsize, typed)(function)


def _reduce_new_type(encoder: Encoder, new_type: Any) -> Any:
    """A ``typing.NewType`` of the notebook."""
    return (
        encoder.definition(new_type, new_type.__name__)
        or (typing.NewType, (new_type.__name__, new_type.__supertype__))
        if new_type.__module__ == encoder.realm.ns.get("__name__")
        else new_type.__reduce__()
    )


FUNCTION_WRAPPERS: dict[type, Callable[[Encoder, Any], Any]] = {
    type(functools.lru_cache(lambda: None)): _reduce_cached_function,
    typing.NewType: _reduce_new_type,
}


def reduce_exception(encoder: Encoder, error: BaseException) -> Any:
    """An exception with its cause, its context, and where it was raised."""
    kind = type(error)
    if kind.__reduce__ is not BaseException.__reduce__ and not issubclass(kind, OSError):
        reduced = _tried(encoder, error, lambda: error.__reduce_ex__(5))
        if not isinstance(reduced, tuple) or reduced[0] is not kind:
            return reduced
    else:
        reduced = error.__reduce__()
    attributes = reduced[2] if len(reduced) > 2 else None
    state: dict[str, Any] = {"attributes": attributes} if isinstance(attributes, dict) else {}
    for name in ("__cause__", "__context__"):
        if getattr(error, name) is not None:
            state[name] = getattr(error, name)
    if error.__suppress_context__:
        state["__suppress_context__"] = True
    if error.__traceback__ is not None:
        state["__traceback__"], files = tracebacks.flatten(error.__traceback__)
        for filename in sorted(files):
            encoder.note_source(filename)
    return make_exception, (kind, reduced[1]), state, None, None, set_exception


def make_exception(kind: type[BaseException], arguments: tuple[Any, ...]) -> BaseException:
    """An exception, even if its type wants other arguments than it keeps."""
    try:
        return kind(*arguments)
    except Exception:
        error = kind.__new__(kind, *arguments)
        error.args = arguments
        return error


def set_exception(error: BaseException, state: dict[str, Any]) -> None:
    """Fills an exception."""
    BaseException.__setstate__(error, state.pop("attributes", {}))
    if "__traceback__" in state:
        error.__traceback__ = tracebacks.rebuild(state.pop("__traceback__"))
    for name, value in state.items():
        setattr(error, name, value)
