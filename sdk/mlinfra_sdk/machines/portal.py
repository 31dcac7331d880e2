"""The one background thread of this process in which all connections live."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio

T = TypeVar("T")

_TICK = 0.2


class Portal:
    """An event loop in a daemon thread, used from ordinary code.

    The caller blocks in a wait that Ctrl-C interrupts.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop: asyncio.AbstractEventLoop
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlinfra", daemon=True)
        self._thread.start()
        self._started.wait()

    def _run(self) -> None:
        anyio.run(self._main)

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._started.set()
        await anyio.sleep_forever()

    def call(
        self, coroutine: Coroutine[Any, Any, T], meanwhile: Callable[[], None] | None = None
    ) -> T:
        """Run a coroutine to its end. An interrupt cancels it and waits until it has cleaned up
        (what was launched for it costs until then); a second one does not wait. ``meanwhile`` is
        called here several times a second."""
        ended = threading.Event()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(self.loop.create_task(coroutine))
            tasks[0].add_done_callback(lambda _: ended.set())

        self.loop.call_soon_threadsafe(begin)
        try:
            while not ended.wait(_TICK if meanwhile is not None else None):
                assert meanwhile is not None
                meanwhile()
        except BaseException:
            self.loop.call_soon_threadsafe(lambda: tasks[0].cancel())
            ended.wait()
            raise
        return tasks[0].result()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Begin to run a coroutine; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Let a coroutine run on in the background."""
        asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def soon(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function in the loop's thread; the quick way for small things."""
        self.loop.call_soon_threadsafe(function, *arguments)


_lock = threading.Lock()
_portal: Portal | None = None


def portal() -> Portal:
    """This process's portal; a forked child gets its own."""
    global _portal
    with _lock:
        if _portal is None or _portal.pid != os.getpid():
            _portal = Portal()
        return _portal
