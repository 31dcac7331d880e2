"""Wires between processes of one machine: the agent listens on a unix socket."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import anyio

from mlinfra_sdk.errors import LinkError
from mlinfra_sdk.link.relay import HANDOVER
from mlinfra_sdk.link.wire import RelayedWire, SocketWire, Wire

_GREETING_S = 20.0
_ADDRESS_LIMIT = 100


async def connect_unix(path: Path) -> Wire:
    """A wire to the agent that listens on the unix socket ``path`` of this machine."""
    connection = socket.socket(socket.AF_UNIX)
    connection.setblocking(False)
    try:
        with _short_path(path) as address:
            while True:
                try:
                    connection.connect(address)
                    break
                except BlockingIOError:  # the listener's queue is full
                    await anyio.sleep(0.01)
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError):
            raise LinkError(
                f"No agent answers at {path}: {error.strerror or error}.",
                hint="It may have stopped; start a new one with `%remote restart`.",
            ) from None
        raise
    return SocketWire(connection)


async def serve_unix(path: Path, handle: Callable[[Wire], Awaitable[None]]) -> None:
    """Listen on ``path`` (mode 0600, replacing a stale socket) and run ``handle`` on each wire.

    Runs until it is cancelled, and then removes the socket.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.setblocking(False)
    with contextlib.ExitStack() as stack:
        stack.callback(listener.close)
        address = stack.enter_context(_short_path(path))
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(path.lstat().st_mode):
                path.unlink()
        listener.bind(address)
        stack.callback(path.unlink, missing_ok=True)
        path.chmod(0o600)  # nobody can connect before listen()
        listener.listen(64)
        async with anyio.create_task_group() as tasks:
            while True:
                await anyio.wait_readable(listener)
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    tasks.start_soon(_run_handler, handle, listener.accept()[0])


async def _run_handler(
    handle: Callable[[Wire], Awaitable[None]], connection: socket.socket
) -> None:
    wire = None
    try:
        wire = await _accepted(connection)
        await handle(wire)
    except (OSError, TimeoutError):
        pass  # it never said anything
    finally:
        if wire is None:
            connection.close()
        else:
            await wire.aclose()


async def _accepted(connection: socket.socket) -> Wire:
    """A wire on a connection that was accepted, or on what came over it."""
    connection.setblocking(False)
    with anyio.fail_after(_GREETING_S):
        await anyio.wait_readable(connection)
    if connection.recv(1, socket.MSG_PEEK) != HANDOVER:
        return SocketWire(connection)
    flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    _, fds, _, _ = socket.recv_fds(connection, len(HANDOVER), 2, flags)
    if len(fds) != 2:
        for fd in fds:
            os.close(fd)
        raise OSError("A relay handed nothing over.")
    for fd in fds:
        os.set_inheritable(fd, False)
    return RelayedWire(connection, *fds)


@contextlib.contextmanager
def _short_path(path: Path) -> Iterator[str]:
    """An address for ``path`` that fits the 108 bytes (macOS: 104) of a socket address."""
    if len(os.fsencode(path)) < _ADDRESS_LIMIT or not Path("/proc/self/fd").is_dir():
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
