"""A user-land proxy in front of a unix socket that does to a connection what networks do.

Each connection gets a `Plan`: cut at an exact byte of either direction, fall silent instead
(half-open), delay, limit the bandwidth. `net` puts it between every client and agent of a state
directory.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio

from mlinfra_sdk.link.unix import connect_unix
from mlinfra_sdk.link.wire import Wire
from mlinfra_sdk.providers.base import Handle
from mlinfra_sdk.providers.local import LocalProvider
from mlinfra_sdk.worker.folder import SOCKET

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
    late: float = 0.0
    """The client's side is cut after its first words, which reach the server so much later."""


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
    """Listens on ``path`` and connects each client to ``target``, or without one to the socket
    that the client names in a first line."""

    def __init__(self, path: Path, target: Path | None, plan: Callable[[int], Plan]) -> None:
        self.path = path
        self.target = target
        self.plan = plan
        self.connections = 0
        self.cuts = 0
        self.down = False
        """Whether new connections end at once."""
        self.silent = False
        """Whether nothing is carried and nobody is told."""
        self._live: set[anyio.CancelScope] = set()

    def cut_all(self) -> None:
        """Cut every connection now."""
        self.cuts += len(self._live)
        for scope in list(self._live):
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
        try:
            with near, far:
                if self.down:
                    return
                target = str(self.target or await _first_line(near))
                words = b""
                if plan.late:
                    await anyio.wait_readable(near)
                    words = near.recv(_CHUNK)
                    near.close()
                    self.cuts += 1
                    await anyio.sleep(plan.late)
                far.connect(target)
                far.setblocking(False)
                if plan.late:
                    far.send(words)
                    await anyio.sleep(plan.late)
                    return
                async with anyio.create_task_group() as tasks:
                    self._live.add(tasks.cancel_scope)
                    tasks.start_soon(self._carry, near, far, plan, UP, tasks.cancel_scope)
                    tasks.start_soon(self._carry, far, near, plan, DOWN, tasks.cancel_scope)
                    try:
                        await anyio.sleep_forever()
                    finally:
                        self._live.discard(tasks.cancel_scope)
        except OSError:
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
                if self.silent:
                    await anyio.sleep_forever()
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


async def _first_line(near: socket.socket) -> str:
    line = b""
    while not line.endswith(b"\n"):
        await anyio.wait_readable(near)
        data = near.recv(1)
        if not data:
            raise ConnectionResetError
        line += data
    return line.decode().strip()


_PROXY = "MLINFRA_TEST_PROXY"


class ChaosProvider(LocalProvider):
    """``on=chaos``: as ``on=local``, but every connection to an agent goes through the proxy."""

    name = "chaos"
    direct = False
    """Whether this client has a path of its own."""

    async def connect(self, handle: Handle) -> Wire:
        if self.direct:
            return await super().connect(handle)
        wire = await connect_unix(Path(os.environ[_PROXY]))
        await wire.send([f"{handle.data['folder']}/{SOCKET}\n".encode()])
        return wire


class Net:
    """The path between the clients and agents of this process and its children, in a thread."""

    def __init__(self, folder: Path) -> None:
        self.proxy = ChaosProxy(folder / "proxy", None, lambda _: Plan())
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.proxy.run)
            self._ready.set()
            await self._end.wait()
            tasks.cancel_scope.cancel()

    def plan(self, plan: Callable[[int], Plan]) -> None:
        """What happens to the connections from now on, counted from 0."""
        first = self.proxy.connections
        self.proxy.plan = lambda number: plan(number - first)

    def cut(self) -> None:
        """Cut all connections now."""
        self._loop.call_soon_threadsafe(self.proxy.cut_all)

    def down(self) -> None:
        """Cut all connections, and let none be made."""
        self.proxy.down = True
        self.cut()

    def up(self) -> None:
        """Let connections be made."""
        self.proxy.down = self.proxy.silent = False

    def start(self) -> None:
        self._thread.start()
        self._ready.wait()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()


@contextmanager
def net(folder: Path) -> Iterator[Net]:
    """A net whose provider ``chaos`` is registered for this process and those that it starts."""
    information = folder / "mlinfra_chaos-1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mlinfra-chaos\nVersion: 1\n"
    )
    (information / "entry_points.txt").write_text(
        "[mlinfra.providers]\nchaos = chaos:ChaosProvider\n"
    )
    added = [str(folder), str(Path(__file__).parent)]
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", _PROXY)}
    it = Net(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join([*added, before["PYTHONPATH"] or ""])
    os.environ[_PROXY] = str(it.proxy.path)
    sys.path[:0] = added
    it.start()
    try:
        yield it
    finally:
        it.stop()
        for path in added:
            sys.path.remove(path)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
