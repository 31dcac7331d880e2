"""Commands in a sandbox, with binary stdin and stdout."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import anyio

from mlinfra_sdk.errors import LinkClosed, LinkError, MlinfraError
from mlinfra_sdk.link.frames import Buffer
from mlinfra_sdk.providers.modal.errors import translate, translated
from mlinfra_sdk.providers.remote import Remote
from mlinfra_sdk.providers.waiting import runs

if TYPE_CHECKING:
    from modal import Sandbox
    from modal.container_process import ContainerProcess

_PIECE = 4 << 20
"""Bytes of one write. Each write is a call that is answered, so small ones would wait for the
network's delay again and again; the client's limit is 16 MiB."""
_CLOSING = 5.0
_SHOWN = 2000


class SandboxWire:
    """The stdin and stdout of a command. What is sent is collected while a write is under way."""

    def __init__(self, sandbox: Sandbox, process: ContainerProcess[bytes]) -> None:
        self._sandbox = sandbox
        self._process = process
        self._output: AsyncIterator[bytes] = process.stdout.__aiter__()
        self._rest = memoryview(b"")
        self._waiting = bytearray()
        self._moved = asyncio.Event()
        self._failure: LinkError | None = None
        self._closed = False
        self._complaint = b""
        self._tasks = [
            asyncio.create_task(self._write()),
            asyncio.create_task(self._listen()),
        ]
        self._pending: asyncio.Task[bytes] | None = None

    def _move(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """Send the bytes; returns while the last of them may still be on their way."""
        for buffer in buffers:
            rest = memoryview(buffer)
            while rest:
                while len(self._waiting) >= _PIECE and self._failure is None:
                    await self._moved.wait()
                if self._failure is not None:
                    raise self._failure
                room = _PIECE - len(self._waiting)
                self._waiting += rest[:room]
                rest = rest[room:]
                self._move()

    async def _write(self) -> None:
        try:
            while True:
                while not self._waiting:
                    await self._moved.wait()
                piece, self._waiting = self._waiting, bytearray()
                self._move()
                with translated():
                    self._process.stdin.write(piece)
                    await self._process.stdin.drain.aio()
        except (MlinfraError, ValueError, BufferError) as error:
            self._fail(str(error))

    def _fail(self, why: str) -> None:
        if self._failure is None:
            self._failure = LinkError(f"The connection broke: {why}", hint="It is made again.")
        self._move()

    async def receive_into(self, space: memoryview, *, fill: bool = False) -> int:
        """Receive at least one byte; 0 when the command has ended."""
        if not self._rest:
            if self._pending is None:  # one that was not waited for to its end goes on
                self._pending = asyncio.create_task(self._next())
            data = await asyncio.shield(self._pending)
            self._pending = None
            self._rest = memoryview(data)
        count = min(len(space), len(self._rest))
        space[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    async def _next(self) -> bytes:
        if self._closed:
            raise LinkError("The connection is closed.")
        try:
            with translated():
                return await anext(self._output, b"")
        except MlinfraError as error:
            raise LinkError(f"The connection broke: {error.message}", hint=error.hint) from None

    async def _listen(self) -> None:
        with contextlib.suppress(MlinfraError), translated():
            async for data in self._process.stderr:
                self._complaint = (self._complaint + data)[-_SHOWN:]

    def complaint(self) -> str:
        """The end of what the command wrote to stderr."""
        return self._complaint.decode("utf-8", "replace").strip()

    async def aclose(self) -> None:
        """End the command's input, which ends what we run there. Modal cannot end a command; one
        that is out of reach ends when it has heard nothing for a while."""
        if self._closed:
            return
        self._closed = True
        self._fail("it was closed")
        with anyio.CancelScope(shield=True), anyio.move_on_after(_CLOSING):
            await _cancelled(self._tasks[0])
            with contextlib.suppress(Exception):
                self._process.stdin.write_eof()
                await self._process.stdin.drain.aio()
        with anyio.CancelScope(shield=True):
            await _cancelled(self._tasks[1])
            if self._pending is not None:
                await _cancelled(self._pending)
            with contextlib.suppress(Exception):
                await detach(self._sandbox)


async def detach(sandbox: Sandbox) -> None:
    """Give up the connection to the sandbox's host."""
    await sandbox.detach.aio()  # type: ignore[no-untyped-call]


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with contextlib.suppress(Exception, asyncio.CancelledError):
        await task


class SandboxRemote(Remote):
    """Commands in the sandbox of this id."""

    where = "the Modal sandbox"

    def __init__(self, sandbox_id: str) -> None:
        self._id = sandbox_id

    async def exec(self, argv: Sequence[str]) -> SandboxWire:
        """Start a command. Raises :class:`LinkClosed` if the sandbox has ended."""
        import modal
        from modal.exception import ConflictError, Error, NotFoundError

        try:
            with translated():
                sandbox = await modal.Sandbox.from_id.aio(self._id)
                if sandbox.returncode is not None:
                    raise LinkClosed("The sandbox has ended.")
                process = await sandbox.exec.aio(*argv, text=False, bufsize=-1)
                runs()  # it is answered when the sandbox has been scheduled and has started
        except MlinfraError as error:
            if isinstance(error.__cause__, (ConflictError, NotFoundError)):
                raise LinkClosed("The sandbox has ended.") from None
            if isinstance(error, LinkError):
                raise
            cause = error.__cause__
            assert isinstance(cause, Error)
            raise LinkError(translate(cause).message, hint=error.hint) from None
        return SandboxWire(sandbox, process)


def environment(volume: str) -> Mapping[str, str]:
    """Variables that keep large downloads in the volume, which outlives the machine."""
    return {"HF_HOME": f"{volume}/huggingface", "TORCH_HOME": f"{volume}/torch"}
