"""One kernel process and its sockets, and how it is spoken with: in Jupyter's own messages.

The sockets are unix sockets in a private directory: nothing listens on the network.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import anyio
import zmq
import zmq.asyncio
from jupyter_client.session import Session

from mlinfra_sdk.errors import KernelDied
from mlinfra_sdk.worker.messages import JOBS_VARIABLE

START_LIMIT = 60.0
"""Seconds within which a kernel must answer."""

_numbers = itertools.count(1)
_IDENTITY = b"mlinfra-agent"


class KernelProcess:
    """One kernel process and its sockets."""

    def __init__(self, sockets: Path, env: Mapping[str, str], cwd: str, interpreter: Path) -> None:
        self._place = f"{sockets}/{next(_numbers)}"
        self.welcomed = anyio.Event()
        self.asking = anyio.Semaphore(0)
        self.ended = anyio.Event()
        self._ready = anyio.Event()
        self._alive = True
        self._subshell: str | None = None
        self._subshell_lock = anyio.Lock()
        key = secrets.token_hex(16)
        self._session = Session(key=key.encode(), username="mlinfra")
        self._session.check_pid = False
        file = self._connection_file(key)
        with suppress(OSError):
            Path(cwd or ".").stat()
        self._process = subprocess.Popen(
            [interpreter, "-m", "mlinfra_sdk.worker.kernel", "-f", str(file)],
            env={
                **_environ(interpreter),
                **env,
                JOBS_VARIABLE: self._address("jobs"),
                "JPY_PARENT_PID": str(os.getpid()),
            },
            cwd=cwd if cwd and os.path.isdir(cwd) else None,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._context = zmq.asyncio.Context()
        self.iopub = self._socket(zmq.SUB, "iopub")
        self.iopub.subscribe(b"")
        self._shell = self._socket(zmq.DEALER, "shell")
        self._stdin = self._socket(zmq.DEALER, "stdin")
        self._control = self._socket(zmq.DEALER, "control")
        self._jobs = self._socket(zmq.PUSH, "jobs")

    def _address(self, channel: str) -> str:
        numbers = {"shell": 1, "iopub": 2, "stdin": 3, "control": 4, "hb": 5, "jobs": 6}
        return f"ipc://{self._place}-{numbers[channel]}"

    def _connection_file(self, key: str) -> Path:
        path = Path(f"{self._place}-kernel.json")
        info = {
            "transport": "ipc",
            "ip": self._place,
            "key": key,
            "signature_scheme": "hmac-sha256",
            "kernel_name": "mlinfra",
            "shell_port": 1,
            "iopub_port": 2,
            "stdin_port": 3,
            "control_port": 4,
            "hb_port": 5,
        }
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(info, file)
        return path

    def _socket(self, kind: int, channel: str) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.linger = 0
        socket.sndhwm = socket.rcvhwm = 0
        socket.reconnect_ivl = 5
        if kind == zmq.DEALER:
            socket.identity = _IDENTITY
        socket.connect(self._address(channel))
        return socket

    @property
    def alive(self) -> bool:
        return self._alive and self._process.poll() is None

    async def wait_ready(self) -> None:
        """Until the kernel listens on all channels. Raises :class:`KernelDied`."""
        with anyio.move_on_after(START_LIMIT):
            async with anyio.create_task_group() as tasks:

                async def watch() -> None:
                    await self.ended.wait()
                    tasks.cancel_scope.cancel()

                tasks.start_soon(watch)
                await self.send("kernel_info_request", "ready", {}, {}, [])
                await self._shell.recv_multipart()
                await self.welcomed.wait()
                self._ready.set()
                tasks.cancel_scope.cancel()
        if not self._ready.is_set():
            reason = (
                explain(self._process.returncode)
                if self._process.poll() is not None
                else f"The remote kernel did not start within {START_LIMIT:g} s."
            )
            self.kill()
            raise KernelDied(reason, hint="The agent's log (agent.log) says more.")

    async def wait(self) -> int:
        """Until the process has ended; its exit status."""
        try:
            while self._process.poll() is None:
                # Nothing tells the event loop of a child's end on all platforms and Pythons.
                await anyio.sleep(0.05)
        finally:
            self._alive = False
        return self._process.returncode

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        self._alive = False
        self.signal(signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        self._context.destroy(linger=0)
        for path in Path(self._place).parent.glob(f"{Path(self._place).name}-*"):
            path.unlink(missing_ok=True)

    async def send(
        self,
        msg_type: str,
        msg_id: str,
        content: Any,
        metadata: Any,
        buffers: list[bytes],
        subshell: str | None = None,
    ) -> None:
        """A request on the shell channel; what it causes has ``msg_id`` as its parent."""
        await self._send(self._shell, msg_type, msg_id, content, metadata, buffers, subshell)

    async def send_job(self, run: str, content: Any, metadata: Any, buffers: list[bytes]) -> None:
        """An execute request, on the kernel's own socket for them."""
        await self._send(
            self._jobs, "execute_request", run, content, metadata, buffers, ident=_IDENTITY
        )

    async def _send(
        self,
        socket: zmq.asyncio.Socket,
        msg_type: str,
        msg_id: str,
        content: Any,
        metadata: Any = None,
        buffers: list[bytes] | None = None,
        subshell: str | None = None,
        ident: bytes | None = None,
    ) -> None:
        header = {
            "msg_id": msg_id,
            "msg_type": msg_type,
            "username": "mlinfra",
            "session": self._session.session,
            "date": datetime.now(timezone.utc).isoformat(),
            "version": "5.4",
        }
        if subshell is not None:
            header["subshell_id"] = subshell
        message = {
            "header": header,
            "msg_id": msg_id,
            "msg_type": msg_type,
            "parent_header": {},
            "content": content,
            "metadata": metadata or {},
        }
        parts = self._session.serialize(message, ident)
        await socket.send_multipart([*parts, *(buffers or [])])

    async def receive_iopub(self) -> list[bytes]:
        """(header, parent, metadata, content, buffers...) of the next message, as JSON texts.

        The socket lies in a private directory of this user: signatures are not checked again.
        """
        parts: list[bytes] = await self.iopub.recv_multipart()
        return parts[parts.index(b"<IDS|MSG>") + 2 :]

    async def receive_stdin(self) -> list[bytes]:
        parts: list[bytes] = await self._stdin.recv_multipart()
        return parts[parts.index(b"<IDS|MSG>") + 2 :]

    async def answer(self, text: str) -> None:
        await self._send(self._stdin, "input_reply", secrets.token_hex(8), {"value": text})

    async def notify(self, msg_type: str, content: bytes) -> None:
        """A message on the control channel that is not answered."""
        await self._send(self._control, msg_type, secrets.token_hex(8), json.loads(content))

    async def subshell(self) -> str | None:
        """The subshell for comm messages, made at the first call; None if there are none."""
        async with self._subshell_lock:
            if self._subshell is None:
                await self._send(self._control, "create_subshell_request", secrets.token_hex(8), {})
                parts = await self._control.recv_multipart()
                content = json.loads(parts[parts.index(b"<IDS|MSG>") + 5])
                self._subshell = content.get("subshell_id", "")
            return self._subshell or None


def _environ(interpreter: Path) -> dict[str, str]:
    """The agent's variables; with another interpreter those that its environment needs."""
    env = dict(os.environ)
    if str(interpreter) != sys.executable:
        for name in ("PYTHONPATH", "PYTHONHOME"):  # packages of the agent's
            env.pop(name, None)
        env["VIRTUAL_ENV"] = str(interpreter.parents[1])
        env["PATH"] = os.pathsep.join((str(interpreter.parent), env.get("PATH", os.defpath)))
    return env


def explain(returncode: int) -> str:
    """How a kernel process ended, in words."""
    if returncode >= 0:
        return f"The remote kernel exited with status {returncode}."
    with suppress(ValueError):
        name = signal.Signals(-returncode).name
        causes = {
            "SIGKILL": " (killed; often the machine ran out of memory)",
            "SIGSEGV": " (a crash in native code)",
            "SIGABRT": " (a crash in native code)",
            "SIGBUS": " (a crash in native code, or a full disk below mapped data)",
        }
        return f"The remote kernel was ended by {name}{causes.get(name, '')}."
    return f"The remote kernel was ended by signal {-returncode}."
