"""A user-land proxy in front of a unix socket that does to a connection what networks do.

Each connection gets a `Plan`: cut at an exact byte of either direction, fall silent instead
(half-open), delay, limit the bandwidth.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anyio

UP, DOWN = 0, 1
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Plan:
    """What happens to one connection; lengths in bytes, times in seconds."""

    cut: tuple[int | None, int | None] = (None, None)
    """After how many bytes up (to the server) and down the connection is cut."""
    half_open: bool = False
    """Instead of a cut, nothing more is carried, and neither side is told."""
    delay: float = 0.0
    rate: float = 0.0
    """Bytes per second and direction; 0 is unlimited."""


def random_cuts(seed: int, count: int, longest: int) -> Callable[[int], Plan]:
    """``count`` connections that are cut at a random byte, then unharmed ones.

    Lengths are log-uniform, so that many cuts fall into the handshake and into headers.
    """
    source = random.Random(seed)

    def plan(number: int) -> Plan:
        if number >= count:
            return Plan()
        length = int(longest ** source.random())
        return Plan(cut=(length, None) if source.random() < 0.5 else (None, length))

    return plan


class ChaosProxy:
    """Listens on ``path`` and connects each client to ``target``."""

    def __init__(self, path: Path, target: Path, plan: Callable[[int], Plan]) -> None:
        self.path = path
        self.target = target
        self.plan = plan
        self.connections = 0
        self.cuts = 0
        self._live: set[anyio.CancelScope] = set()

    def cut_all(self) -> None:
        """Cut every connection now."""
        for scope in self._live:
            scope.cancel()

    async def run(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.setblocking(False)
        with listener:
            listener.bind(str(self.path))
            listener.listen(64)
            async with anyio.create_task_group() as tasks:
                while True:
                    await anyio.wait_readable(listener)
                    near, _ = listener.accept()
                    plan = self.plan(self.connections)
                    self.connections += 1
                    tasks.start_soon(self._carry_both, near, plan)

    async def _carry_both(self, near: socket.socket, plan: Plan) -> None:
        far = socket.socket(socket.AF_UNIX)
        near.setblocking(False)
        far.setblocking(False)
        try:
            with near, far:
                far.connect(str(self.target))
                async with anyio.create_task_group() as tasks:
                    self._live.add(tasks.cancel_scope)
                    tasks.start_soon(self._carry, near, far, plan, UP, tasks.cancel_scope)
                    tasks.start_soon(self._carry, far, near, plan, DOWN, tasks.cancel_scope)
                    try:
                        await anyio.sleep_forever()
                    finally:
                        self._live.discard(tasks.cancel_scope)
        except ConnectionError:
            pass

    async def _carry(
        self,
        source: socket.socket,
        sink: socket.socket,
        plan: Plan,
        direction: int,
        scope: anyio.CancelScope,
    ) -> None:
        left = plan.cut[direction]
        try:
            while left is None or left > 0:
                await anyio.wait_readable(source)
                data = source.recv(_CHUNK if left is None else min(_CHUNK, left))
                if not data:
                    break
                if plan.delay:
                    await anyio.sleep(plan.delay)
                if plan.rate:
                    await anyio.sleep(len(data) / plan.rate)
                if left is not None:
                    left -= len(data)
                rest = memoryview(data)
                while rest:
                    try:
                        rest = rest[sink.send(rest) :]
                    except BlockingIOError:
                        await anyio.wait_writable(sink)
        except ConnectionError:
            pass
        if left == 0:
            self.cuts += 1
            if plan.half_open:
                await anyio.sleep_forever()
        scope.cancel()
