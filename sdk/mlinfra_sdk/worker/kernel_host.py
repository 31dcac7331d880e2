"""A kernel by its name, whatever process it has: runs that wait for each other, its end, its next
process."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.abc

from mlinfra_sdk.errors import KernelDied
from mlinfra_sdk.worker.kernel_process import KernelProcess, explain
from mlinfra_sdk.worker.messages import Execute
from mlinfra_sdk.worker.records import (
    ASKING,
    BEGUN,
    COUNT,
    DIED,
    ENDING,
    HANDLED,
    INPUT,
    RESULT,
    Record,
)

_LAST_WORDS = 30.0
"""Seconds within which what a kernel published before its end must have been taken."""
_NOTICED = 0.2
"""Seconds within which a kernel surely notices a signal."""

_OWN_MESSAGES = frozenset({"status", "execute_input", "iopub_welcome", "shutdown_reply"})

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
        self._process: KernelProcess | None = None
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
        process = KernelProcess(self._sockets, self._env, self.cwd, self.interpreter)
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
        cell = {"op": "cell", "count": job.count, "again": job.again, "watch": job.watch}
        metadata = {"mlinfra": cell}
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

    def _require(self) -> KernelProcess:
        if self._process is None or not self._process.alive:
            raise KernelDied("The remote kernel does not run.")
        return self._process

    async def _pump(self, process: KernelProcess) -> None:
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
            await self._died(explain(returncode), by_accident=returncode < 0)
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

    async def _pump_iopub(self, process: KernelProcess) -> None:
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

    async def _pump_stdin(self, process: KernelProcess) -> None:
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
