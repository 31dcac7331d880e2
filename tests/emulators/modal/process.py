"""Processes of sandboxes, whose output can be read again from any recent byte on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress

_CHUNK = 1 << 20
_KEPT = 32 << 20
"""Bytes of output that are kept after they were read once."""
_AHEAD = 16 << 20
"""Bytes that a process may be ahead of its reader."""
NOT_FOUND = 127


class Gone(Exception):
    """Output at this offset is no longer kept."""


class Output:
    """The bytes that a process wrote to one descriptor."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._start = 0
        self._read = 0
        self._ended = False
        self._changed = asyncio.Event()

    @property
    def _end(self) -> int:
        return self._start + len(self._data)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def add(self, data: bytes) -> None:
        """Append ``data``, and forget what was read long ago."""
        self._data += data
        surplus = min(self._read - self._start, len(self._data)) - _KEPT
        if surplus > _CHUNK:
            del self._data[:surplus]
            self._start += surplus
        self._wake()

    def close(self) -> None:
        """No more will come."""
        self._ended = True
        self._wake()

    async def room(self) -> None:
        """Wait until the reader has caught up."""
        while self._end - self._read > _AHEAD and not self._ended:
            await self._changed.wait()

    async def read(self, offset: int) -> AsyncIterator[bytes]:
        """Everything from ``offset`` on, as it comes, to the end."""
        if not self._start <= offset <= self._end:
            raise Gone
        while True:
            while offset < self._end:
                place = offset - self._start
                chunk = bytes(memoryview(self._data)[place : place + _CHUNK])
                offset += len(chunk)
                self._read = max(self._read, offset)
                yield chunk
                self._wake()
            if self._ended:
                return
            await self._changed.wait()


class Process:
    """A running command. Its input is numbered by bytes: what arrives twice is dropped."""

    def __init__(self) -> None:
        self.stdout = Output()
        self.stderr = Output()
        self.argv: Sequence[str] = ()
        self.returncode: int | None = None
        self.ended = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._received = 0
        self._order = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: str, timeout: float | None = None
    ) -> None:
        """Start ``argv`` in a session of its own; it is killed after ``timeout`` seconds."""
        self.argv = argv
        try:
            self._process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
                limit=_CHUNK,
            )
        except OSError as error:
            self.stderr.add(f"{argv[0]}: {error.strerror}\n".encode())
            self._end(NOT_FOUND)
            return
        assert self._process.stdout is not None and self._process.stderr is not None
        for source, sink in (
            (self._process.stdout, self.stdout),
            (self._process.stderr, self.stderr),
        ):
            self._tasks.append(asyncio.create_task(self._pump(source, sink)))
        self._tasks.append(asyncio.create_task(self._wait(timeout)))

    @property
    def pid(self) -> int | None:
        """The process's number here."""
        return self._process.pid if self._process else None

    def _end(self, returncode: int) -> None:
        self.returncode = returncode
        self.stdout.close()
        self.stderr.close()
        self.ended.set()

    async def _pump(self, source: asyncio.StreamReader, sink: Output) -> None:
        while data := await source.read(_CHUNK):
            sink.add(data)
            await sink.room()

    async def _wait(self, timeout: float | None) -> None:
        assert self._process is not None
        try:
            returncode = await asyncio.wait_for(self._process.wait(), timeout)
        except asyncio.TimeoutError:
            self.kill()
            returncode = await self._process.wait()
        # A child that it left behind may hold the pipes open: what is there now is all.
        await asyncio.wait(self._tasks[:2], timeout=0.2)
        for pump in self._tasks[:2]:
            pump.cancel()
        self._end(returncode)

    async def write(self, offset: int, data: bytes, eof: bool) -> None:
        """Write input that begins at ``offset`` of all input."""
        async with self._order:
            if offset > self._received:
                raise Gone
            fresh = data[self._received - offset :]
            stdin = self._process.stdin if self._process else None
            if stdin is None:
                return
            with suppress(ConnectionError):
                if fresh:
                    stdin.write(fresh)
                    self._received += len(fresh)
                    await stdin.drain()
                if eof:
                    stdin.close()

    def kill(self) -> None:
        """Kill the process itself."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
