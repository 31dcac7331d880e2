"""Programs with binary stdin and stdout on the machine of a Jupyter Server, by a kernel's comms.

The other half is ``in_kernel.py``.
"""

from __future__ import annotations

import inspect
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel

from mlinfra_sdk.errors import LinkError, ProviderError
from mlinfra_sdk.link.frames import Buffer
from mlinfra_sdk.providers.jupyter import in_kernel
from mlinfra_sdk.providers.jupyter.channel import KernelChannel, Message, open_channel
from mlinfra_sdk.providers.jupyter.server import Server

_PING_EVERY = 20.0
"""Seconds in which this program must be heard of; it is asked after half of them."""
_ENDS = ("restarting", "dead")
_START_WITHIN = 60.0
_AGAIN_AFTER = 5.0
_GOODBYE_WITHIN = 2.0
_STDERR_KEPT = 64 << 10


class KernelProcess:
    """A program that runs there: a wire whose other end are its stdin and stdout.

    A websocket that breaks ends it, as a connection that breaks ends what ``ssh`` runs.
    """

    def __init__(self, channel: KernelChannel) -> None:
        self._channel = channel
        self._comm = uuid.uuid4().hex
        self._turn = anyio.Lock()
        self._steps = 0
        self._chunks: deque[memoryview] = deque()
        self._stderr = bytearray()
        self._lost = ""
        self._sent = self._written = 0
        self._arrived = self._used = self._told = 0
        self._unanswered = 0
        self._closed = False
        self._goodbye = ""
        self._dismissed = False
        self._heard = anyio.current_time()
        self._asked = False
        self.returncode: int | None = None
        """Its exit status, once it has ended."""

    async def start(self, argv: Sequence[str]) -> None:
        """Run the program; a kernel that does not yet know how to is taught first."""
        source = inspect.getsource(in_kernel)
        install = f"exec({source!r}, {{'__name__': '__main__', 'get_ipython': get_ipython}})"
        request = {
            "code": install,
            "silent": True,
            "store_history": False,
            "user_expressions": {},
            "allow_stdin": False,
            "stop_on_error": False,
        }
        reply = None
        with anyio.move_on_after(_START_WITHIN):
            while reply is None:
                # A server may not yet have subscribed to what the kernel publishes when it lets us
                # in, and loses it then. Nothing is lost any more once something has come.
                with anyio.move_on_after(_AGAIN_AFTER):
                    reply = await self._answered("execute_request", request)
        if reply is None:
            raise LinkError("The kernel does not answer.", hint="Something may keep it busy.")
        if reply.content.get("status") != "ok":
            raise ProviderError(
                f"The kernel cannot run programs: {reply.content.get('evalue', 'no reason')}.",
                hint="The server must offer a Python kernel (ipykernel) on a POSIX system.",
            )
        await self._tell({"argv": list(argv)}, kind="comm_open", target_name=in_kernel.TARGET)

    async def _answered(self, kind: str, request: dict[str, Any]) -> Message:
        """The reply to a request of which something was published, too."""
        question = await self._channel.send("shell", kind, request)
        reply, published = None, False
        while reply is None or not published:
            message = await self._channel.receive()
            if message.parent == question:
                if message.channel == "iopub":
                    published = True
                else:
                    reply = message
        return reply

    async def send(self, buffers: Sequence[Buffer]) -> None:
        """Write to its stdin, all of it."""
        for piece in _pieces(buffers, in_kernel.PIECE):
            await self._until(lambda: self._ended or self._sent - self._written < in_kernel.WINDOW)
            if self._ended:
                raise LinkError(f"The program there has ended. {self.complaint()}".strip())
            at, self._sent = self._sent, self._sent + len(piece)
            await self._tell({"at": at}, [piece])
            await anyio.lowlevel.checkpoint()  # websockets only waits when its buffer is full

    async def receive_into(self, space: memoryview, *, fill: bool = False) -> int:
        """Read from its stdout at least one byte; 0 when it has ended."""
        await self._until(lambda: bool(self._chunks) or self._ended)
        if not self._chunks:
            return 0
        chunk = self._chunks[0]
        count = min(len(space), len(chunk))
        space[:count] = chunk[:count]
        if count == len(chunk):
            self._chunks.popleft()
            self._unanswered += 1
        else:
            self._chunks[0] = chunk[count:]
        self._used += count
        if (
            self._used - self._told >= in_kernel.WINDOW // 4
            or self._unanswered >= in_kernel.WINDOW_MESSAGES // 4
        ):
            self._told, self._unanswered = self._used, 0
            with suppress(LinkError):  # what has arrived is given out also after a cut
                await self._tell({"got": self._used})
        return count

    def complaint(self) -> str:
        """The end of what it has written to stderr so far, or why it is lost."""
        return self._stderr.decode("utf-8", "replace").strip() or self._lost

    async def aclose(self) -> None:
        """End the program, if it still runs, and close the websocket."""
        if self._closed:
            return
        self._closed = True
        with anyio.CancelScope(shield=True):
            if not self._ended:
                with suppress(LinkError), anyio.move_on_after(_GOODBYE_WITHIN):
                    self._goodbye = await self._tell({}, kind="comm_close")
                    # A server drops what it has not passed on when the websocket is closed.
                    await self._until(lambda: self._dismissed or self._ended)
            await self._channel.aclose()

    @property
    def _ended(self) -> bool:
        return self.returncode is not None

    async def _tell(
        self,
        data: dict[str, Any],
        buffers: Sequence[Buffer] = (),
        kind: str = "comm_msg",
        **more: str,
    ) -> str:
        content = {"comm_id": self._comm, "data": data, **more}
        return await self._channel.send("shell", kind, content, buffers)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Whoever waits takes messages, one waiter at a time, for all of them."""
        while not condition():
            step = self._steps
            async with self._turn:
                if step == self._steps:
                    try:
                        await self._take()
                    except LinkError as error:
                        self._lost = str(error)
                        raise
                    self._steps += 1

    async def _take(self) -> None:
        """Take one message. Nobody says that a kernel is gone, or that a message was dropped: when
        this program was silent for long, the kernel is asked for all that should have come."""
        pause = _PING_EVERY if self._asked else _PING_EVERY / 2
        message = None
        with anyio.move_on_at(self._heard + pause):
            message = await self._channel.receive()
        if message is None:
            if self._asked:
                raise LinkError("The kernel that carried the connection does not answer.")
            self._asked = True
            await self._tell({"ping": True})
        elif self._goodbye and message.parent == self._goodbye:  # its kernel says that it is busy
            self._dismissed = True
        elif message.kind in ("comm_msg", "comm_close"):
            if message.content.get("comm_id") == self._comm:
                self._heard, self._asked = anyio.current_time(), False
                self._on_comm(message)
        elif message.kind == "status" and message.content.get("execution_state") in _ENDS:
            raise LinkError("The kernel that carried the connection has ended.")

    def _on_comm(self, message: Message) -> None:
        if message.kind == "comm_close":
            raise LinkError("The kernel does not know how to run programs.")
        data = message.content["data"]
        if "fault" in data:
            raise LinkError(
                f"The program cannot be run there: {data['fault']}.",
                hint="The server's system misses it, or does not let you run it.",
            )
        if "err" in data:
            for buffer in message.buffers:
                self._stderr += buffer
            del self._stderr[:-_STDERR_KEPT]
        if "at" in data:
            if data["at"] != self._arrived:
                raise LinkError(
                    "The server dropped output of its kernel.",
                    hint="Its iopub_msg_rate_limit may be too low.",
                )
            for buffer in message.buffers:
                self._arrived += len(buffer)
                self._chunks.append(buffer)
        self._written = max(self._written, int(data.get("got", 0)))
        if "exit" in data:
            self.returncode = int(data["exit"])


async def open_process(server: Server, kernel_id: str, argv: Sequence[str]) -> KernelProcess:
    """Run the program in a session of its own on the machine of the kernel."""
    process = KernelProcess(await open_channel(server, kernel_id))
    try:
        await process.start(argv)
    except BaseException:
        await process.aclose()
        raise
    return process


def _pieces(buffers: Sequence[Buffer], size: int) -> list[Buffer]:
    """The same bytes in pieces of at most ``size``, small ones put together."""
    total = sum(len(buffer) for buffer in buffers)
    if total <= size:
        return [b"".join(buffers)] if total else []
    pieces: list[Buffer] = []
    for buffer in buffers:
        view = memoryview(buffer)
        pieces += [view[start : start + size] for start in range(0, len(view), size)]
    return pieces
