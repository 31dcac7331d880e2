"""``@remote``: functions that run on a machine wherever they are called."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload

from mlinfra_sdk import spec
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Layer, Request
from mlinfra_sdk.worker.messages import WORKER_VARIABLE

P = ParamSpec("P")
R = TypeVar("R")


class RemoteFunction(Protocol[P, R]):
    """A function that runs on a machine.

    ``local`` is the undecorated function. ``session()`` gives the session that it uses, to stop
    its machine or to look at it.
    """

    local: Callable[P, R]
    session: Callable[[], Session]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call it on its machine."""
        ...


@overload
def remote(function: Callable[P, R], /) -> RemoteFunction[P, R]: ...


@overload
def remote(**settings: object) -> Callable[[Callable[P, R]], RemoteFunction[P, R]]: ...


def remote(function: Callable[..., Any] | None = None, /, **settings: object) -> Any:
    """Have a function run on a machine, as if it ran here.

    >>> @remote(idle="30m")
    ... def train(data): ...

    Settings are those of ``%%remote``. The machine starts with the first call, is shared by all
    functions that ask for the same one, and stops when this process ends (unless it has a
    ``machine`` name) or when it was idle. A coroutine function stays one: its calls are awaited.

    On the machine itself decorated functions run in place: helpers and recursion start no machine
    from a machine.
    """
    if function is None:
        return functools.partial(_decorated, settings=settings)
    return _decorated(function, settings)


def _decorated(function: Callable[..., Any], settings: dict[str, object]) -> Any:
    origin = f"the decorator of {function.__qualname__}"
    # Over there other providers may be installed, and the settings are of no use.
    values = {} if on_machine() else spec.parse(settings, place=spec.NOTEBOOK, origin=origin).values
    layer = Layer(origin, dict(values))

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            if on_machine():
                return await function(*args, **kwargs)
            return await _call_in_thread(_share(layer), function, args, kwargs)

        decorated = call_async
    else:

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if on_machine():
                return function(*args, **kwargs)
            return _share(layer).session.call(function, *args, **kwargs)

        decorated = call
    result = cast("Any", decorated)
    result.local = function
    result.session = lambda: _share(layer).session
    return result


def on_machine() -> bool:
    """Whether this process is a kernel on a machine."""
    return WORKER_VARIABLE in os.environ


class _Shared:
    """A session, and the thread in which coroutines wait for it, one after the other."""

    def __init__(self, request: Request) -> None:
        self.session = Session(request=request)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="mlinfra-calls")


_shared: dict[tuple[object, ...], _Shared] = {}
_lock = threading.Lock()


def _share(layer: Layer) -> _Shared:
    """What all decorated functions that can use the same machine have in common."""
    request = spec.resolve([*spec.configured(), layer]).request
    with _lock:
        shared = _shared.get(request.place)
        if shared is None:
            shared = _shared[request.place] = _Shared(request)
        else:
            shared.session.configure(request)
    return shared


async def _call_in_thread(
    shared: _Shared, function: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """A call, awaited; cancelling it interrupts the machine."""
    future = shared.thread.submit(shared.session.call, function, *args, **kwargs)
    try:
        return await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        if not future.cancel():
            shared.session.interrupt()
        raise
