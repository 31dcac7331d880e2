"""Wires: duplex byte streams that a link session runs on.

A wire promises nothing but order: it may end at any byte.  Descriptors (unix sockets, the pipes of
a relay process) are read and written directly with ``readv``/``writev``, which saves the copies
that a buffering stream makes; anything else that anyio can speak fits through `StreamWire`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import IO, Protocol

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread

from mlinfra_sdk.errors import LinkError
from mlinfra_sdk.link.frames import Buffer

_BURST = 1 << 20
"""Bytes after which a wire that never has to wait lets other tasks run."""

_SOCKET_BUFFER = 1 << 20
_PIPE_BUFFER = 1 << 20
_FILL_S = 0.1
"""How long a space that is to be filled is kept while something arrives."""
_TELL_S = 5.0
_TERMINATION = 1.0
_STDERR_SHOWN = 2000


class Wire(Protocol):
    """A duplex byte stream.  Every failure is raised as :class:`LinkError`."""

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """Send all the bytes of all buffers, in order."""

    async def receive_into(self, space: memoryview, *, fill: bool = False) -> int:
        """Receive at least one byte into ``space``; 0 means that the other side has ended. With
        ``fill`` nothing but all of it is of use: a wire may come back more rarely then, though at
        least ten times a second while something arrives."""

    async def aclose(self) -> None:
        """Close at once; calls that are waiting end with an error."""


class DescriptorWire:
    """A wire on a readable and a writable descriptor, which may be the same one.

    The reading side stays registered with the asyncio loop, and reads when the loop says so:
    anyio's ``wait_readable`` registers anew each time, which costs a third of a round trip. What
    does not fit into a pipe at once is read and written by the loop's callbacks, not by the task
    that waits for it: a quick pipe is ready some ten thousand times a second.
    """

    def __init__(self, read_fd: int, write_fd: int) -> None:
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._sent = 0
        self._received = 0
        for fd in (read_fd, write_fd):
            _widen(fd)
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._registered = False
        self._drained = False
        self._space = memoryview(b"")
        self._filled = 0
        self._until = 0.0
        """When a space that is to be filled is given back in any case."""
        self._arrival: asyncio.Future[int] | None = None
        self._departure: asyncio.Future[None] | None = None

    async def send(self, buffers: Sequence[Buffer]) -> None:
        rest = list(buffers)
        try:
            if not self._write(rest):
                await self._departs(rest)
        except (OSError, anyio.ClosedResourceError) as error:
            raise _broken(error) from None
        if self._sent > _BURST:
            self._sent = 0
            await anyio.lowlevel.checkpoint()

    def _write(self, rest: list[Buffer]) -> bool:
        """Write what can be written, and take it out of ``rest``; whether that was all."""
        while rest:
            try:
                count = os.writev(self._write_fd, rest)
            except BlockingIOError:
                return False
            self._sent += count
            done = 0
            while done < len(rest) and count >= len(rest[done]):
                count -= len(rest[done])
                done += 1
            del rest[:done]
            if count:
                rest[0] = memoryview(rest[0])[count:]
        return True

    async def _departs(self, rest: list[Buffer]) -> None:
        if self._closed:
            raise anyio.ClosedResourceError
        self._departure = self._loop.create_future()
        self._loop.add_writer(self._write_fd, self._writable, rest)
        self._sent = 0
        try:
            await self._departure
        finally:
            self._departure = None
            if not self._closed:
                self._loop.remove_writer(self._write_fd)

    def _writable(self, rest: list[Buffer]) -> None:
        departure = self._departure
        if departure is None or departure.done():
            return
        try:
            if self._write(rest):
                departure.set_result(None)
        except OSError as error:
            departure.set_exception(error)

    async def receive_into(self, space: memoryview, *, fill: bool = False) -> int:
        if self._received > _BURST:
            self._received = 0
            await anyio.lowlevel.checkpoint()
        count = 0
        try:
            if not self._drained:
                with contextlib.suppress(BlockingIOError):
                    count = self._read(space)
                    if not fill or count in (0, len(space)):
                        return count
            return await self._arrives(space, count, fill)
        except (OSError, anyio.ClosedResourceError) as error:
            raise _broken(error) from None

    def _read(self, space: memoryview) -> int:
        count = os.readv(self._read_fd, [space])
        self._received += count
        self._drained = count < len(space)
        return count

    async def _arrives(self, space: memoryview, filled: int, fill: bool) -> int:
        if self._closed:
            raise anyio.ClosedResourceError
        if not self._registered:
            self._loop.add_reader(self._read_fd, self._readable)
            self._registered = True
        self._space, self._filled = space, filled
        self._until = self._loop.time() + _FILL_S if fill else 0.0
        self._arrival = self._loop.create_future()
        self._received = 0
        try:
            return await self._arrival
        finally:
            self._arrival = None

    def _readable(self) -> None:
        arrival = self._arrival
        if arrival is None or arrival.done():
            if self._arrival is None:  # nobody wants it now
                self._loop.remove_reader(self._read_fd)
                self._registered = False
            return
        try:
            count = self._read(self._space[self._filled :])
        except BlockingIOError:
            return
        except OSError as error:
            arrival.set_exception(error)
            return
        self._filled += count
        more = count and self._filled < len(self._space)
        if not (more and self._until and self._loop.time() < self._until):
            arrival.set_result(self._filled)

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._registered:
            self._loop.remove_reader(self._read_fd)
        if self._departure is not None:
            self._loop.remove_writer(self._write_fd)
        for waiting in (self._arrival, self._departure):
            if waiting is not None and not waiting.done():
                waiting.set_exception(anyio.ClosedResourceError())
        self._read_fd = self._write_fd = -1  # the numbers may soon be those of other files
        await self._release()

    async def _release(self) -> None:
        raise NotImplementedError


class SocketWire(DescriptorWire):
    """A wire on a connected stream socket, which it owns."""

    def __init__(self, connection: socket.socket) -> None:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
        super().__init__(connection.fileno(), connection.fileno())
        self._socket = connection

    async def _release(self) -> None:
        self._socket.close()


class ProcessWire(DescriptorWire):
    """A wire on the stdin and stdout of a process, usually one that runs the relay elsewhere."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        read_fd: int,
        write_fd: int,
        stderr: IO[bytes],
    ) -> None:
        super().__init__(read_fd, write_fd)
        self._fds = (read_fd, write_fd)
        self.process = process
        self._stderr = stderr

    def complaint(self) -> str:
        """The end of what the process wrote to stderr."""
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - _STDERR_SHOWN))
        return self._stderr.read().decode("utf-8", "replace").strip()

    async def _release(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self.process.terminate()
        with anyio.CancelScope(shield=True):
            try:
                await anyio.to_thread.run_sync(self.process.wait, _TERMINATION)
            except subprocess.TimeoutExpired:
                self.process.kill()
                await anyio.to_thread.run_sync(self.process.wait)
        self._stderr.close()


class RelayedWire(DescriptorWire):
    """A wire on the stdio that a relay has handed over. The relay is told that something arrives,
    and stands by until the wire is closed; the wire breaks when the relay is gone."""

    def __init__(self, relay: socket.socket, read_fd: int, write_fd: int) -> None:
        super().__init__(read_fd, write_fd)
        self._fds = (read_fd, write_fd)
        self._relay = relay
        self._told = 0.0
        self._gone = False
        self._loop.add_reader(relay, self._relay_ends)

    async def receive_into(self, space: memoryview, *, fill: bool = False) -> int:
        now = time.monotonic()
        if now - self._told > _TELL_S:
            self._told = now
            with contextlib.suppress(OSError):  # told often enough, or gone
                self._relay.send(b".")
        if self._gone:
            return 0
        return await super().receive_into(space, fill=fill)

    def _relay_ends(self) -> None:
        self._gone = True
        self._loop.remove_reader(self._relay)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(self._filled)

    async def _release(self) -> None:
        if not self._gone:
            self._loop.remove_reader(self._relay)
        for fd in self._fds:
            os.close(fd)
        self._relay.close()


class StreamWire:
    """A wire on any anyio byte streams (a TLS stream, a websocket adapter)."""

    def __init__(
        self, receiver: anyio.abc.ByteReceiveStream, sender: anyio.abc.ByteSendStream
    ) -> None:
        self._receiver = receiver
        self._sender = sender
        self._rest = memoryview(b"")

    async def send(self, buffers: Sequence[Buffer]) -> None:
        try:
            await self._sender.send(b"".join(buffers))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise _broken(error) from None

    async def receive_into(self, space: memoryview, *, fill: bool = False) -> int:
        if not self._rest:
            try:
                self._rest = memoryview(await self._receiver.receive(len(space)))
            except anyio.EndOfStream:
                return 0
            except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
                raise _broken(error) from None
        count = min(len(space), len(self._rest))
        space[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    async def aclose(self) -> None:
        await anyio.aclose_forcefully(self._sender)
        await anyio.aclose_forcefully(self._receiver)


def _widen(fd: int) -> None:
    """Have a pipe hold a lot."""
    with contextlib.suppress(OSError, AttributeError):  # no pipe, or beyond the user's limit
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BUFFER)


def _broken(error: BaseException) -> LinkError:
    return LinkError(
        f"The connection broke: {error or type(error).__name__}.",
        hint="It is made again by itself.",
    )
