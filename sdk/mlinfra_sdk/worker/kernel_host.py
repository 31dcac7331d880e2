"""One kernel process and the agent's conversation with it, in Jupyter's own messages.

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
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import zmq
import zmq.asyncio
from jupyter_client.session import Session

from mlinfra_sdk.errors import KernelDied
from mlinfra_sdk.worker.messages import (
    ASKING,
    BEGUN,
    COUNT,
    DIED,
    ENDING,
    HANDLED,
    INPUT,
    JOBS_VARIABLE,
    RESULT,
    Execute,
    Record,
)

_LAST_WORDS = 30.0
"""Seconds within which what a kernel published before its end must have been taken."""
_NOTICED = 0.2
"""Seconds within which a kernel surely notices a signal."""
START_LIMIT = 60.0
"""Seconds within which a kernel must answer."""

_OWN_MESSAGES = frozenset({"status", "execute_input", "iopub_welcome", "shutdown_reply"})
_numbers = itertools.count(1)
_IDENTITY = b"mlinfra-agent"

Publish = Callable[[Record], Awaitable[None]]


class KernelHost:
    """A kernel by name; its process can be replaced (:meth:`restart`).

    ``publish`` takes every message that a client should see.
    """

    def __init__(
        self,
        name: str,
        sockets: Path,
        env: Mapping[str, str],
        tasks: anyio.abc.TaskGroup,
        publish: Publish,
    ) -> None:
        self.name = name
        self.cwd = ""
        self.environment = ""
        """The key of the environment whose interpreter it has."""
        self.interpreter = Path(sys.executable)
        self.generation = 0
        self.running: set[str] = set()
        """The run that has been handed to the kernel and has not ended, and those that wait."""
        self.handling: set[str] = set()
        """Comm messages that have been handed to the kernel and have not been handled."""
        self._sockets = sockets
        self._env = env
        self._tasks = tasks
        self._publish = publish
        self._lock = anyio.Lock()
        self._process: _Process | None = None
        self._evaluations: dict[str, _Waiter] = {}
        self._current: str | None = None
        self._queue: deque[Execute] = deque()
        self._evaluated = 0
        self._interrupted = 0.0

    @property
    def alive(self) -> bool:
        """Whether the kernel's process runs."""
        return self._process is not None and self._process.alive

    @property
    def starting(self) -> bool:
        """Whether its process is being started or ended."""
        return self._lock.statistics().locked

    @property
    def pid(self) -> int:
        """The process id, or 0."""
        return self._process.pid if self._process else 0

    async def ensure(self) -> None:
        """Start the kernel's process if it does not run. Raises :class:`KernelDied`."""
        async with self._lock:
            if not self.alive:
                if self._process is not None:
                    await self._process.ended.wait()
                await self._start()

    async def restart(self) -> None:
        """End the process, whatever it is doing, and start a fresh one."""
        async with self._lock:
            await self._end("it was restarted")
            await self._start()

    async def close(self, machine: str = "") -> None:
        """End the process for good; ``machine`` says why its machine ends with it."""
        async with self._lock:
            await self._end(
                f"The machine has ended: {machine}." if machine else "it was closed", machine
            )

    async def _start(self) -> None:
        self.generation += 1
        process = _Process(self._sockets, self._env, self.cwd, self.interpreter)
        self._process = process
        self._tasks.start_soon(self._pump, process)
        await process.wait_ready()

    async def _end(self, reason: str, machine: str = "") -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            await process.ended.wait()
            await self._died(reason, machine)

    async def execute(self, request: Execute) -> None:
        """Hand a cell to the kernel."""
        self._require()
        self.running.add(request.run)
        if self._current is None:
            await self._begin(request)
        else:
            self._queue.append(request)

    async def _begin(self, job: Execute) -> None:
        self._current = job.run
        await self._publish(Record(self.name, job.run, 0, BEGUN))
        metadata = {"mlinfra": {"op": "cell", "count": job.count, "again": job.again}}
        await self._execute(job.run, job.code, metadata, [job.inputs], stdin=job.allow_stdin)

    async def withdraw(self, run: str) -> bool:
        """Take a run out of the queue; False if it does not wait there."""
        for job in self._queue:
            if job.run == run:
                self._queue.remove(job)
                reason = "The run was cancelled before it began."
                content = json.dumps({"reason": reason, "status": "cancelled"})
                await self._emit(run, DIED, content.encode(), b"{}", [])
                return True
        return False

    async def evaluate(self, what: str, arguments: list[str]) -> bytes:
        """Have the kernel answer ``fetch`` or ``values``; gives encoded Outputs."""
        self._evaluated += 1
        run = f"evaluation-{self._evaluated}"
        waiter = self._evaluations[run] = _Waiter()
        try:
            metadata = {"mlinfra": {"op": what, "arguments": arguments}}
            await self._execute(run, "pass", metadata, [], stdin=False)
            await waiter.done.wait()
        finally:
            del self._evaluations[run]
        record = waiter.record
        content = json.loads(record.content)
        if record.msg_type == DIED:
            raise KernelDied(content["reason"])
        if content["status"] != "ok":
            raise KernelDied(f"{content['ename']}: {content['evalue']}")
        return record.buffers[0]

    async def _execute(
        self,
        run: str,
        code: str,
        metadata: dict[str, Any],
        buffers: list[bytes],
        *,
        stdin: bool,
    ) -> None:
        content = {
            "code": code,
            "silent": False,
            "store_history": "cell" in metadata["mlinfra"]["op"],
            "user_expressions": {},
            "allow_stdin": stdin,
            "stop_on_error": False,
        }
        # The kernel may notice an earlier interrupt only now; it is not meant for this.
        metadata["mlinfra"]["sent"] = max(time.monotonic(), self._interrupted + _NOTICED)
        await self._require().send_job(run, content, metadata, buffers)

    async def comm(
        self, parent: str, msg_type: str, content: bytes, metadata: bytes, buffers: list[bytes]
    ) -> None:
        """Pass a comm message on. While a cell runs it goes to a subshell, so that a widget's
        callback need not wait for the cell's end."""
        process = self._require()
        self.handling.add(parent)
        subshell = await process.subshell() if self.running else None
        await process.send(
            msg_type, parent, json.loads(content), json.loads(metadata), buffers, subshell
        )

    async def answer(self, text: str) -> None:
        """What the user typed at an ``input_request``."""
        await self._require().answer(text)

    async def ending(self, content: bytes) -> None:
        """Tell the process what is about to end (:data:`ENDING`)."""
        process = self._process
        if process is not None and process.alive:
            await process.notify(ENDING, content)

    async def count(self, run: str) -> None:
        """Have the process tell how far the loops of a run are (:data:`METERS`)."""
        process = self._process
        if process is not None and process.alive:
            await process.notify(COUNT, json.dumps({"run": run}).encode())

    async def kill(self, reason: str) -> None:
        """End the process, whatever it is doing; the next run starts a fresh one."""
        async with self._lock:
            await self._end(reason)

    def interrupt(self) -> None:
        """SIGINT to the kernel and its children, as Ctrl-C in a terminal."""
        self._require().signal(signal.SIGINT)
        self._interrupted = time.monotonic()

    def _require(self) -> _Process:
        if self._process is None or not self._process.alive:
            raise KernelDied("The remote kernel does not run.")
        return self._process

    async def _pump(self, process: _Process) -> None:
        """Everything that one process publishes, until it ends."""
        async with anyio.create_task_group() as pumps:
            pumps.start_soon(self._pump_iopub, process)
            pumps.start_soon(self._pump_stdin, process)
            returncode = await process.wait()
            # What it published before it died is still on its way through the socket.
            with anyio.move_on_after(_LAST_WORDS):
                while await process.iopub.poll(100):
                    await anyio.sleep(0.01)
            pumps.cancel_scope.cancel()
        process.close()
        if self._process is process:
            await self._died(_explain(returncode), by_accident=returncode < 0)
        process.ended.set()

    async def _died(self, reason: str, machine: str = "", *, by_accident: bool = False) -> None:
        said = {
            "reason": reason,
            "generation": self.generation,
            "machine": machine,
            "by_accident": by_accident,
        }
        content = json.dumps(said).encode()
        for waiter in list(self._evaluations.values()):
            waiter.finish(Record(self.name, "", 0, DIED, content))
        runs = ["", *sorted(self.running | self.handling)]
        self.running.clear()
        self.handling.clear()
        self._queue.clear()
        self._current = None
        for run in runs:
            await self._emit(run, DIED, content, b"{}", [])

    async def _pump_iopub(self, process: _Process) -> None:
        while True:
            header, parent, metadata, content, *buffers = await process.receive_iopub()
            msg_type = json.loads(header)["msg_type"]
            if msg_type == "iopub_welcome":
                process.welcomed.set()
            elif msg_type == ASKING:
                process.asking.release()
            elif msg_type not in _OWN_MESSAGES:
                run = json.loads(parent).get("msg_id", "")
                waiter = self._evaluations.get(run)
                if waiter is None:
                    await self._emit(run, msg_type, content, metadata, buffers)
                elif msg_type == RESULT:
                    waiter.finish(Record(self.name, run, 0, RESULT, content, metadata, buffers))

    async def _pump_stdin(self, process: _Process) -> None:
        while True:
            header, parent, _, content, *_ = await process.receive_stdin()
            if json.loads(header)["msg_type"] == "input_request":
                run = json.loads(parent).get("msg_id", "")
                await process.asking.acquire()
                await self._emit(run, INPUT, content, b"{}", [])

    async def _emit(
        self, run: str, msg_type: str, content: bytes, metadata: bytes, buffers: list[bytes]
    ) -> None:
        await self._publish(Record(self.name, run, 0, msg_type, content, metadata, buffers))
        if msg_type == HANDLED:
            self.handling.discard(run)
        elif msg_type in (RESULT, DIED):
            self.running.discard(run)
            if run == self._current:
                self._current = None
                if self._queue:
                    # If its process is gone by now, all that wait are about to be told.
                    with suppress(KernelDied):
                        await self._begin(self._queue.popleft())


class _Waiter:
    record: Record

    def __init__(self) -> None:
        self.done = anyio.Event()

    def finish(self, record: Record) -> None:
        self.record = record
        self.done.set()


class _Process:
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
                _explain(self._process.returncode)
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


def _explain(returncode: int) -> str:
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
