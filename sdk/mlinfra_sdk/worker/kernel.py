"""``python -m mlinfra_sdk.worker.kernel``: the kernel on the machine.

It is an ordinary ipykernel that brings its variables up to date before a cell and reports what
the cell changed after it, all within the one execute request.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import zmq
from ipykernel.comm.comm import BaseComm
from ipykernel.iostream import OutStream
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp
from ipykernel.utils import _async_in_context
from traitlets.config import Config
from zmq.eventloop.zmqstream import ZMQStream

from mlinfra_sdk.checkpoints import announce
from mlinfra_sdk.checkpoints.folder import watched
from mlinfra_sdk.errors import ChunkCorrupt, ChunkMissing, MlinfraError
from mlinfra_sdk.meters import Meter, meters, watch
from mlinfra_sdk.namespace import places
from mlinfra_sdk.namespace.delta import Inputs, Outputs
from mlinfra_sdk.namespace.sync import WorkerNamespace
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.worker import ending, forks
from mlinfra_sdk.worker.checkpoints import KernelCheckpoints
from mlinfra_sdk.worker.interrupts import Interrupts
from mlinfra_sdk.worker.messages import (
    JOBS_VARIABLE,
    SHARED_VARIABLE,
    STORE_VARIABLE,
    WORKER_VARIABLE,
    WORKSPACES_VARIABLE,
)
from mlinfra_sdk.worker.modules import WorkspaceModules
from mlinfra_sdk.worker.records import ASKING, COUNT, ENDING, HANDLED, METERS, RESULT
from mlinfra_sdk.worker.watchdog import End

_decode_inputs = msgspec.msgpack.Decoder(Inputs).decode
_encode = msgspec.msgpack.Encoder().encode
_LOST = (ChunkCorrupt, ChunkMissing)


_REPORTED = (
    "status",
    "ename",
    "evalue",
    "traceback",
    "payload",
    "loading",
    "warnings",
)


class Job(msgspec.Struct):
    """What an execute request carries beside its code, in its metadata."""

    op: str
    count: int = 0
    arguments: list[str] = []
    again: bool = False
    watch: tuple[str, str] = ("", "")
    sent: float = 0.0
    """When the agent handed it over, by the monotonic clock."""


class Stream(OutStream):
    """stdout or stderr. ipykernel flushes both several times for each cell, and each time its main
    thread waits for another one; here only if there is something to be sent."""

    def flush(self) -> None:
        if self.echo is not None or getattr(self, "_buffers", True):
            super().flush()


class WorkerKernel(IPythonKernel):
    """An ipykernel whose variables follow those of a notebook elsewhere."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.control_handlers[ENDING] = self._ending
        self.control_handlers[COUNT] = self._count
        self.log.setLevel(logging.WARNING)  # ipykernel makes records of each message for no one
        self._job: Job | None = None
        self._inputs = Inputs()
        self._result: Any = None
        self._loaded = False
        self._interrupts = Interrupts()
        self._taking = False
        self._namespace = WorkerNamespace(
            self._shell.user_ns,
            ChunkStore(Path(os.environ[STORE_VARIABLE])),
            hidden=self._hidden,
            shared_fs=os.environ.get(SHARED_VARIABLE) == "1",
        )
        workspaces = os.environ.get(WORKSPACES_VARIABLE, "")
        self._modules = WorkspaceModules(workspaces)
        if workspaces:
            places.set_base(workspaces)
        self._shell.events.register("post_run_cell", self._after_cell)
        self._run: Any = {}
        """The parent of what the present run publishes from other threads than the main one."""
        KernelCheckpoints(self._publish_of_run)

    def start(self) -> None:
        """Also take the agent's requests from a socket of their own, in the main thread: the way
        through ipykernel's shell thread costs a warm cell half a millisecond."""
        super().start()
        self._interrupts.install()
        watch()
        self._wake_on_signals()
        address = os.environ.get(JOBS_VARIABLE)
        if address:
            jobs: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
            jobs.linger = 0
            jobs.bind(address)
            self._jobs = ZMQStream(jobs, self.io_loop)
            # In one context for all cells: numpy, decimal and others keep settings in it.
            take = _async_in_context(self._take_job)
            self._jobs.on_recv(take, copy=False)

    def _wake_on_signals(self) -> None:
        """Let a signal end the event loop's sleep: without it an interrupt of a top-level await
        is noticed when something else happens."""
        self._wakeup = socket.socketpair()
        reader, writer = self._wakeup
        reader.setblocking(False)
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

        def drain(_: socket.socket, events: int) -> None:
            reader.recv(4096)

        self.io_loop.add_handler(reader, drain, self.io_loop.READ)

    async def _take_job(self, msg: Any) -> None:
        self._taking = True
        await self.shell_main(None, msg)

    def pre_handler_hook(self) -> None:
        """Let interrupts through while other messages than jobs are handled."""
        super().pre_handler_hook()
        if self._taking:
            self._taking = False
            self.post_handler_hook()

    @property
    def _shell(self) -> Any:
        return self.shell

    def _ending(self, stream: Any, ident: Any, parent: dict[str, Any]) -> None:
        """The agent's word that it all ends soon, which comes also while a cell runs."""
        ending.announce(msgspec.convert(parent["content"], End))

    def _count(self, stream: Any, ident: Any, parent: dict[str, Any]) -> None:
        """The agent asks how far the loops of a run are."""
        found = meters.read()
        if found:
            self._publish_meters(found, {"msg_id": parent["content"]["run"]})

    def _publish_meters(self, found: list[Meter], header: dict[str, Any]) -> None:
        session: Any = self.session
        session.send(
            self.iopub_socket,
            METERS,
            {"meters": msgspec.to_builtins(found)},
            parent={"header": header},
            ident=self._topic(METERS),
        )

    def _hidden(self) -> Iterable[str]:
        return list(self._shell.user_ns_hidden)

    def _after_cell(self, result: Any) -> None:
        self._result = result

    async def execute_request(self, stream: Any, ident: Any, parent: dict[str, Any]) -> None:
        """An execute request of the agent, or an ordinary one."""
        job = parent["metadata"].get("mlinfra")
        if job is None:
            await super().execute_request(stream, ident, parent)
            return
        self._job = msgspec.convert(job, Job)
        buffers = parent.get("buffers") or []
        self._inputs = _decode_inputs(bytes(buffers[0])) if buffers else Inputs()
        await super().execute_request(stream, ident, parent)

    async def do_execute(self, code: str, silent: bool, *args: Any, **kwargs: Any) -> Any:
        """Loads the variables, runs the cell, reports what it changed."""
        job, self._job = self._job, None
        if job is None:
            return await super().do_execute(code, silent, *args, **kwargs)
        self._loaded = job.op != "cell"
        try:
            with self._interrupts.raised(job.sent):
                content, outputs = await self._do(job, code, silent, *args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            content, outputs = _failed(error) | {"loading": not self._loaded}, Outputs()
            # Of chunks that are not there the client is told by the result; it sends them again.
            if job.op == "cell" and not (isinstance(error, _LOST) and not self._loaded):
                self._publish_error(content)
        self._publish_result(content, outputs)
        return content

    async def _do(
        self, job: Job, code: str, silent: bool, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], Outputs]:
        if job.op == "cell":
            return await self._run_cell(job, code, silent, *args, **kwargs)
        outputs = Outputs()
        if job.op == "fetch":
            outputs = self._namespace.fetch(job.arguments[0])
        elif job.op == "values":
            outputs = self._namespace.values(job.arguments)
        return {"status": "ok"}, outputs

    async def _run_cell(
        self, job: Job, code: str, silent: bool, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], Outputs]:
        self._shell.execution_count = job.count
        self._result = None
        self._run = self.get_parent("shell")
        announce.rerun(job.again)
        inputs, self._inputs = self._inputs, Inputs()
        warnings = self._modules.refresh()
        warnings += self._namespace.load(inputs) or ()
        self._loaded = True
        meters.begin()
        name, path = job.watch
        with watched(name, path) if path else nullcontext():
            content = await super().do_execute(code, silent, *args, **kwargs)
        if found := meters.read():
            self._publish_meters(found, self.get_parent("shell")["header"])
        self._modules.note()
        result, self._result = self._result, None
        extra: dict[str, Any] = {}
        raised: BaseException | None = None
        if result is not None:
            raised = result.error_in_exec or result.error_before_exec
            if result.result is not None:
                extra["_"] = result.result
        outputs = self._namespace.collect(extra=extra, error=raised)
        return content | {"warnings": warnings}, outputs

    def _publish_status(self, status: str, channel: str, parent: Any = None) -> None:
        """Only the end of a comm message; that of a run is known by its result."""
        parent = parent or self.get_parent(channel)
        if status != "idle" or not parent or not parent["msg_type"].startswith("comm_"):
            return
        session: Any = self.session
        session.send(self.iopub_socket, HANDLED, {}, parent=parent, ident=self._topic(HANDLED))

    def _publish_execute_input(self, code: str, parent: Any, execution_count: int) -> None:
        """Left out: the notebook has the code."""

    def _publish_error(self, content: dict[str, Any]) -> None:
        """An error beside the cell's own, which the shell has shown already."""
        _flush()
        session: Any = self.session
        session.send(
            self.iopub_socket,
            "error",
            {key: content[key] for key in ("ename", "evalue", "traceback")},
            parent=self.get_parent("shell"),
            ident=self._topic("error"),
        )

    def _input_request(self, *args: Any, **kwargs: Any) -> str:
        """Say so on iopub first: the request itself could overtake outputs before it."""
        _flush()
        session: Any = self.session
        parent = self.get_parent("shell")
        session.send(self.iopub_socket, ASKING, {}, parent=parent, ident=self._topic(ASKING))
        text: str = super()._input_request(*args, **kwargs)
        return text

    def _publish_of_run(self, kind: str, content: dict[str, Any], buffers: list[bytes]) -> None:
        """Behind what the run has published; may be called in any thread."""
        _flush()
        session: Any = self.session
        session.send(
            self.iopub_socket,
            kind,
            content,
            parent=self._run,
            ident=self._topic(kind),
            buffers=buffers,
        )

    def _publish_result(self, content: dict[str, Any], outputs: Outputs) -> None:
        """On iopub, so that it comes after everything that the cell published."""
        _flush()
        session: Any = self.session
        session.send(
            self.iopub_socket,
            RESULT,
            {key: content[key] for key in _REPORTED if key in content},
            parent=self.get_parent("shell"),
            ident=self._topic(RESULT),
            buffers=[_encode(outputs)],
        )


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _failed(error: BaseException) -> dict[str, Any]:
    """An error of ours, or of the user's own pickling code, as an execute reply."""
    if isinstance(error, MlinfraError):
        lines = error._render_traceback_()
    elif isinstance(error, KeyboardInterrupt):
        lines = ["KeyboardInterrupt (while variables moved)"]
    else:
        lines = traceback.format_exception(type(error), error, error.__traceback__)
    return {
        "status": "error",
        "ename": type(error).__name__,
        "evalue": str(error),
        "traceback": lines,
        "execution_count": 0,
        "user_expressions": {},
        "payload": [],
    }


def _reply_subshell_for(comm: Any, data: Any, default: str | None) -> str | None:
    """Where a front end's comm message is handled: where its header says.

    ipykernel prefers the shell that last published on the comm, which may be busy with a cell;
    the agent chooses a subshell just then. Replies to a request still go to who asked.
    """
    request = data.get("content") if isinstance(data, dict) else None
    number = request.get("id") if isinstance(request, dict) else None
    with comm._reply_subshell_lock:
        if isinstance(number, str) and number in comm._reply_subshell_ids:
            subshell: str | None = comm._reply_subshell_ids.pop(number)
            return subshell
    return default


def main() -> None:
    """Run the kernel; options are those of ipykernel."""
    os.environ[WORKER_VARIABLE] = "1"
    if hasattr(BaseComm, "_reply_subshell_for"):  # since ipykernel 7.4
        setattr(BaseComm, "_reply_subshell_for", _reply_subshell_for)  # noqa: B010
    address = os.environ.get(JOBS_VARIABLE)
    if address:
        forks.use_socket(f"{address}-forks")
    config = Config()
    config.HistoryManager.enabled = False
    config.IPKernelApp.outstream_class = f"{Stream.__module__}.{Stream.__qualname__}"
    IPKernelApp.launch_instance(kernel_class=WorkerKernel, config=config)


if __name__ == "__main__":
    # Notebook code owns the name `__main__`; classes of this module must not live there.
    from mlinfra_sdk.worker.kernel import main as run

    run()
