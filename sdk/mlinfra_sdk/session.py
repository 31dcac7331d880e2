"""The face: a session is one notebook's or script's connection to one machine."""

from __future__ import annotations

import concurrent.futures
import contextlib
import inspect
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec

from mlinfra_sdk import lifetime, paths, spec
from mlinfra_sdk.errors import (
    KernelDied,
    LedgerError,
    LinkClosed,
    LinkError,
    MachineLost,
    MlinfraError,
    RemoteValueLost,
    RequestError,
    RunCancelled,
    RunDetached,
    VersionMismatch,
)
from mlinfra_sdk.frontend import Console, Frontend
from mlinfra_sdk.jobs import Background, RunHandle
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines import lifecycle, versions
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.machines.lifecycle import LiveMachine
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.namespace.analysis import CellNames, cell_names
from mlinfra_sdk.namespace.delta import Inputs, Outputs
from mlinfra_sdk.namespace.sync import LocalNamespace, RemoteValue, Report
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.running import (
    Outcome,
    Result,
    Running,
    exception_of,
    follow,
    interrupts_held,
    interrupts_raised,
)
from mlinfra_sdk.spec import Request
from mlinfra_sdk.worker import messages as m

T = TypeVar("T")

_STORE_LIMIT = 20 << 30
"""Bytes that the local chunk store may keep between sessions."""
_FAILURES = (MlinfraError, TimeoutError, concurrent.futures.TimeoutError)
"""What may go wrong in telling a machine that it is needed no longer."""
_decode_outputs = msgspec.msgpack.Decoder(Outputs).decode
_encode_inputs = msgspec.msgpack.Encoder().encode


class Session:
    """A connection to one machine, on which a kernel holds what it was given.

    >>> with Session() as session:
    ...     session.run("x = 6 * 7")
    ...     session.namespace["x"]
    42

    ``namespace`` are the variables that runs read and change; by default those of ``__main__``.
    Settings are those of ``%%remote``: ``Session(on="local", idle="30m")``. The machine starts with
    the first use, and is stopped by :meth:`close`, or when this process ends, unless it was given
    a name by ``machine``.

    Threads may share a session; their runs take place one after the other.
    """

    def __init__(
        self,
        *,
        namespace: dict[str, Any] | None = None,
        hidden: Callable[[], Iterable[str]] | None = None,
        request: Request | None = None,
        notebook: str = "",
        **settings: object,
    ) -> None:
        if request is None:
            layer = spec.parse(settings, place=spec.NOTEBOOK, origin="the arguments of Session")
            request = spec.resolve([*spec.configured(), layer]).request
        self.request = request
        self.namespace = vars(sys.modules["__main__"]) if namespace is None else namespace
        self.comms: Callable[[m.Record], None] = lambda record: None
        """Takes what the kernel publishes beside any run: comm messages of widgets."""
        self._notebook = notebook
        self._hidden = hidden or self._dunders
        self._ledger: Ledger | None = None
        self._store = ChunkStore(paths.data_dir() / "store")
        self._name = ""
        self._machine: LiveMachine | None = None
        self._synced = ""
        """The machine that ``_kernel`` and the records of ``_local`` are about."""
        self._client: AgentClient | None = None
        self._kernel = ""
        self._generation = 0
        """Which process of the kernel holds the variables; 0 if that has to be found out."""
        self._former = 0
        """The generation before the connection was lost."""
        self._death: m.Record | None = None
        self._backgrounds: dict[str, Background] = {}
        self._shared_store = False
        self._local = self._new_namespace(shared_fs=False)
        self._count = 0
        self._comms_passed = False
        self._lock = threading.RLock()

    # -- what a user does --------------------------------------------------------------------

    def run(self, code: str, *, frontend: Frontend | None = None) -> Any:
        """Run code on the machine and wait for its end; gives the value of its last expression.

        Its outputs appear here, what it changes comes back, and what it raises is raised.
        """
        names = cell_names(_transformed(code), self.namespace, code)
        self._count += 1
        result = self.execute(code, names, frontend=frontend or Console(), count=self._count)
        return result.get()

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function on the machine and give what it returns; arguments that it changes in
        place are changed here too. A coroutine function is awaited over there."""
        name = "__mlinfra_call__"
        code = f"{name}[0](*{name}[1], **{name}[2])"
        if inspect.iscoroutinefunction(function):
            code = f"await {code}"
        with self._lock:
            try:
                result = self._execute(
                    code,
                    lambda: self._local.prepare_values({name: (function, args, kwargs)}),
                    frontend=Console(),
                    count=0,
                    kind="call",
                )
            finally:
                self.namespace.pop(name, None)
        if result.error is not None and result.error.__traceback__ is not None:
            # The user did not write the code above.
            result.error.__traceback__ = result.error.__traceback__.tb_next
        value: T = result.get()
        return value

    def push(self, **values: Any) -> None:
        """Bind values to names over there (and here)."""
        self.namespace.update(values)
        result = self._execute(
            "",
            lambda: self._local.prepare_values(values),
            frontend=Console(),
            count=0,
            kind="push",
        )
        result.get()

    def pull(self, *names: str) -> Any:
        """Bring variables here, whatever their size; gives the value, or a list of several."""
        for name in names:
            value = self.namespace.get(name)
            if isinstance(value, RemoteValue):
                value.pull()
        values = [self._pulled(name) for name in names]
        return values[0] if len(names) == 1 else values

    def _pulled(self, name: str) -> Any:
        try:
            return self.namespace[name]
        except KeyError:
            raise MlinfraError(
                f"There is no variable {name!r}, here or on the machine.",
                hint="Check the spelling; variables come here by themselves after a run.",
            ) from None

    def restart(self) -> None:
        """Give the machine a fresh kernel: variables that only lived there are lost."""
        client = self._connect()
        ending = [it.run for it in self._runs_left() if it.kernel == self._kernel and not it.ended]
        info = client.ask(m.RestartKernel(client.next_id(), self._kernel), m.KernelInfo)
        for run in ending:
            client.send(m.Collected(client.next_id(), run))
        self._generation = info.generation
        self._local.forget("the remote kernel was restarted")

    def interrupt(self) -> None:
        """Raise KeyboardInterrupt in what runs on the machine; for any other thread than the one
        that waits for it, in which Ctrl-C does the same."""
        client = self._client
        if client is not None and client.closed is None:
            client.send(m.Interrupt(client.next_id(), self._kernel))

    def stop(self) -> None:
        """Stop the machine and close it in the ledger. The next run starts a new one."""
        lifetime.closed(self)
        machine, self._machine = self._machine, None
        client = self._client
        if machine is not None and client is not None and client.closed is None:
            with contextlib.suppress(*_FAILURES):  # what it runs for this session is not wanted
                client.send(m.Stop(client.next_id(), "stopped by the user")).result(5)
        self._disconnect("the machine was stopped")
        if machine is not None:
            portal().call(lifecycle.stop(machine, self.ledger, "stopped by the user"))

    def close(self) -> None:
        """End the session: stops its machine, unless that has a name and may be shared."""
        kernels = {info.kernel for info in self._runs_left() if info.status != "lost"}
        if self.request.machine is None and not kernels:
            self.stop()
        elif self._client is not None:
            lifetime.closed(self)
            client, kernel = self._client, self._kernel
            if kernel not in kernels:
                with contextlib.suppress(*_FAILURES):
                    client.send(m.CloseKernel(client.next_id(), kernel)).result(5)
            self._disconnect("the session was closed")

    def abandon(self) -> None:
        """In a forked child: the machine is the parent's, the next run starts another one."""
        self._lock = threading.RLock()
        self._machine = self._client = self._ledger = self._death = None
        self._name = self._synced = ""
        self._generation = self._former = 0
        self._backgrounds.clear()
        self._local.forget("it belongs to the parent process")

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- what the magics use -----------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        """This user's ledger."""
        if self._ledger is None:
            self._ledger = Ledger.open()
        return self._ledger

    @property
    def machine(self) -> LiveMachine | None:
        """The machine, once it has been started and unless it is known to be gone."""
        return self._machine

    def agent(self) -> m.AgentInfo | None:
        """What the agent says of itself, or None without a connection."""
        client = self._client
        if client is None or client.closed is not None:
            return None
        with contextlib.suppress(LinkError):
            return client.ask(m.Describe(client.next_id()), m.AgentInfo)
        return None

    def configure(self, request: Request) -> None:
        """Take over settings that can change while the machine runs; the others are its own."""
        changed = (request.idle, request.time) != (self.request.idle, self.request.time)
        self.request = request
        client = self._client
        if changed and client is not None and client.closed is None:
            client.send(m.Limit(client.next_id(), request.idle, request.time))

    def refresh(self) -> None:
        """Bring here what widget callbacks over there have changed since the last run."""
        if not self._comms_passed or self._client is None or self._client.closed is not None:
            return
        self._comms_passed = False
        names = CellNames(frozenset(self._local.known()), frozenset(), frozenset(), False)
        self._execute(
            "", lambda: self._local.prepare(names), frontend=Console(), count=0, kind="pull"
        )

    def execute(
        self,
        code: str,
        names: CellNames,
        *,
        frontend: Frontend,
        count: int,
        cell: str = "",
    ) -> Result:
        """Run a cell; what it raises is in the result, errors of ours are raised."""
        return self._execute(
            code,
            lambda: self._local.prepare(names, code),
            frontend=frontend,
            count=count,
            kind="cell",
            cell=cell,
        )

    # -- runs that go on by themselves -------------------------------------------------------

    def start(
        self,
        code: str,
        names: CellNames,
        *,
        count: int,
        frontend: Frontend | None = None,
        label: str = "",
        cell: str = "",
        new_kernel: bool = False,
    ) -> RunHandle:
        """Run a cell without waiting for it. With a ``frontend`` its outputs appear there as they
        come; without one nobody follows it until :meth:`attach`. Runs of one kernel wait for each
        other; ``new_kernel`` gives it one of its own."""
        with self._lock:
            try:
                return self._start(code, names, count, frontend, label, cell, new_kernel)
            except _NotBegun:
                return self._start(code, names, count, frontend, label, cell, new_kernel)

    def _start(
        self,
        code: str,
        names: CellNames,
        count: int,
        frontend: Frontend | None,
        label: str,
        cell: str,
        new_kernel: bool,
    ) -> RunHandle:
        with self._lock:
            client = self._ready(frontend or Console())
            if new_kernel:
                self._local.abandon()
            try:
                inputs = self._local.prepare(names, code)
                if not self._shared_store and (digests := inputs.digests()):
                    client.upload(digests)
            finally:
                self._local.abandon()
            run, kernel = secrets.token_hex(4), self._kernel
            if new_kernel:
                cwd = os.getcwd() if self._shared_store else ""
                opened = client.ask(m.OpenKernel(client.next_id(), "", cwd), m.KernelInfo)
                kernel = opened.kernel
            background = None
            ledger_run = _new_number()
            if frontend is not None:
                background = Background(frontend.publish, ledger_run)
                client.listen(run, background.sink)
                client.when_closed(background.fail)
            request = m.Execute(
                client.next_id(),
                kernel,
                run,
                code,
                _encode_inputs(inputs),
                count,
                label=label,
                notebook=self._notebook,
                ledger=ledger_run,
                detached=frontend is None,
            )
            try:
                client.send(request).result()
            except KernelDied as error:
                self._forget_kernel(error.message)
                raise _NotBegun from error
            self._open_run(ledger_run, "cell", cell)
            if background is not None:
                self._backgrounds[run] = background
            return RunHandle(self, run, label, background)

    def runs(self) -> list[m.RunInfo]:
        """What runs, waits or has ended on the machine and has not been collected."""
        with self._lock:
            client = self._connect()
            try:
                return client.ask(m.ListRuns(client.next_id()), list[m.RunInfo])
            except LinkClosed:  # the machine has just ended; another one may know them
                client = self._connect()
                return client.ask(m.ListRuns(client.next_id()), list[m.RunInfo])

    def cancel(self, run: str) -> None:
        """Interrupt a run, or take it out of the queue."""
        with self._lock:
            client = self._connect()
            client.send(m.Cancel(client.next_id(), run)).result()

    def attach(self, run: str, *, frontend: Frontend | None = None, take: bool = False) -> Result:
        """Bring a run back, by its id or label: all its outputs, live from there on, and at its
        end its variables. From then on its kernel is this session's."""
        frontend = frontend or Console()
        with self._lock:
            info = self._find_run(run)
            client = self._connect()
            following = Running(info.run, portal(), frontend.publish)
            frontend.begun(info.label or info.run)
            frontend.phase("running")
            background = self._backgrounds.pop(info.run, None)
            if background is not None:
                background.fail(RunDetached(f"The run {run} is shown where it was attached to."))
            client.listen(info.run, following.sink)
            client.send(m.Attach(client.next_id(), info.run, take=take)).result()
            with interrupts_held(following):
                if self._kernel != info.kernel:
                    self._local.forget("this session has turned to another kernel")
                    self._kernel, self._generation = info.kernel, 0
                outcome = self._until_end(client, following, frontend, info.ledger)
                return self._take_over(client, info, outcome)

    def watch(self, run: str, publish: Callable[[m.Record], None], *, until_end: bool) -> None:
        """Show what a run has published, and with ``until_end`` what it still will."""
        with self._lock:
            info = self._find_run(run)
            machine = self._machine
        if machine is None or (not info.messages and not until_end):
            return
        # On a connection of its own: this session may follow the run already.
        client = self._open_client(machine)
        watching = Running(info.run, portal(), publish)

        def tick() -> None:
            if client.closed is not None:
                raise client.closed

        client.listen(info.run, watching.sink)
        try:
            client.send(m.Attach(client.next_id(), info.run, watch=True)).result()
            last = None if until_end else info.messages
            end = watching.wait(lambda content: None, tick, last=last)
            if isinstance(end, m.Record) and end.msg_type == m.LEFT:
                raise self._failure(client, info.run, end)
        finally:
            client.close()

    def collect(self, run: str, background: Background) -> Result:
        """Wait for the end of a run in the background, take over its variables, and let the
        machine forget it."""
        try:
            outcome = background.ended.result()
        except LinkClosed as error:
            raise self._left_alone(run, error) from None
        with self._lock:
            self._backgrounds.pop(run, None)
            client = self._connect()
            if isinstance(outcome, Outcome):
                return self._take_over(client, self._find_run(run), outcome)
            if outcome.msg_type == m.DIED:
                seconds = time.monotonic() - background.began
                self._close_run(background.ledger_run, "lost", seconds, 0, 0)
            raise self._failure(client, run, outcome)

    def _take_over(self, client: AgentClient, info: m.RunInfo, outcome: Outcome) -> Result:
        """The variables of a run that was not waited for from its beginning."""
        result = self._finish(client, outcome, self._local.adopt)
        client.send(m.Collected(client.next_id(), info.run))
        seconds = (info.ended or time.time()) - info.started
        self._close_run(info.ledger, _status_of(result), seconds, 0, 0)
        return result

    def _until_end(
        self, client: AgentClient, run: Running, frontend: Frontend, ledger_run: int
    ) -> Outcome:
        """Follow a run to its end; without a result this raises."""
        began = time.monotonic()
        try:
            ended = follow(client, self._kernel, run, frontend)
        except LinkClosed as error:
            raise self._left_alone(run.name, error) from None
        except KernelDied as error:
            self._forget_kernel(error.message)
            raise _NotBegun from error
        if isinstance(ended, Outcome):
            return ended
        if ended.msg_type == m.DIED:
            self._close_run(ledger_run, "lost", time.monotonic() - began, 0, 0)
        raise self._failure(client, run.name, ended)

    def _failure(self, client: AgentClient, run: str, end: m.Record) -> MlinfraError:
        """What to say of a run that has no result; if nothing more comes of it, the machine may
        forget it."""
        content = msgspec.json.decode(end.content)
        reason, status = content["reason"], content.get("status")
        if end.msg_type == m.LEFT:
            return RunDetached(reason, hint="`%remote runs` lists what is still there.")
        client.send(m.Collected(client.next_id(), run))
        if status == "cancelled":
            return RunCancelled(reason)
        if status == "lost":
            return MachineLost(reason, hint="What it had published until then has been shown.")
        return self._kernel_died(end)

    def _runs_left(self) -> list[m.RunInfo]:
        """Runs on the machine that somebody may still want."""
        client = self._client
        if client is None or client.closed is not None:
            return []
        with contextlib.suppress(MlinfraError):
            return client.ask(m.ListRuns(client.next_id()), list[m.RunInfo])
        return []

    def _find_run(self, run: str) -> m.RunInfo:
        known = self.runs()
        for info in known:
            if run in (info.run, info.label):
                return info
        names = [info.label or info.run for info in known]
        raise RequestError(
            f"There is no run {run!r} on this machine.{spec.did_you_mean(run, names)}",
            hint=f"Runs there: {', '.join(names) or 'none'}.",
        )

    def comm(
        self,
        parent: str,
        msg_type: str,
        content: bytes,
        metadata: bytes,
        buffers: list[bytes],
        frontend: Frontend,
    ) -> None:
        """Pass a front end's comm message to the kernel and wait until it has been handled. May be
        called from any thread, also while a run goes on."""
        client = self._client
        if client is None or not self._generation:
            return
        self._comms_passed = True
        handling = Running(parent, portal(), frontend.publish)
        client.listen(parent, handling.sink)
        request = m.Comm(
            client.next_id(), self._kernel, parent, msg_type, content, metadata, buffers
        )
        handling.submitted(client.send(request))
        try:
            ended = follow(client, self._kernel, handling, frontend)
            if isinstance(ended, m.Record) and ended.msg_type == m.DIED:
                raise self._kernel_died(ended)
        except MlinfraError as error:
            frontend.note(str(error))
        finally:
            client.ignore(parent)

    # -- how it is done ----------------------------------------------------------------------

    def _dunders(self) -> Iterable[str]:
        return [name for name in self.namespace if name.startswith("__")]

    def _new_namespace(self, *, shared_fs: bool) -> LocalNamespace:
        return LocalNamespace(
            self.namespace,
            self._store,
            fetch=self._fetch,
            hidden=self._hidden,
            eager_limit=self.request.eager_limit,
            shared_fs=shared_fs,
        )

    def _execute(
        self,
        code: str,
        prepare: Callable[[], Inputs],
        *,
        frontend: Frontend,
        count: int,
        kind: str,
        cell: str = "",
    ) -> Result:
        with self._lock:
            try:
                return self._exchange(code, prepare, frontend, count, kind, cell)
            except _NotBegun:
                return self._exchange(code, prepare, frontend, count, kind, cell)

    def _exchange(
        self,
        code: str,
        prepare: Callable[[], Inputs],
        frontend: Frontend,
        count: int,
        kind: str,
        cell: str,
    ) -> Result:
        client = self._ready(frontend)
        self._local.eager_limit = self.request.eager_limit
        inputs = prepare()
        before = client.bytes_sent, client.bytes_received
        if not self._shared_store and (digests := inputs.digests()):
            frontend.phase("data")
            client.upload(digests)
        run = Running(secrets.token_hex(4), portal(), frontend.publish)
        client.listen(run.name, run.sink)
        ledger_run = _new_number()
        began = time.monotonic()
        status = "lost"
        sent = sorted({name for group in inputs.groups for name in group.names})
        # What has begun on the machine is also ended there: an interrupt waits for its turn.
        with interrupts_held(run):
            try:
                frontend.begun(run.name)
                frontend.phase("running")
                self._submit(client, run, code, inputs, count, frontend, ledger_run)
                self._open_run(ledger_run, kind, cell)  # while the machine is at work
                outcome = self._until_end(client, run, frontend, 0)
                result = self._finish(client, outcome, self._local.apply)
                client.send(m.Collected(client.next_id(), run.name))
                status = _status_of(result)
            except (RunDetached, KeyboardInterrupt):
                status = ""  # it goes on over there, and whoever collects it closes it
                raise
            finally:
                up, down = client.bytes_sent - before[0], client.bytes_received - before[1]
                if status:
                    self._close_run(ledger_run, status, time.monotonic() - began, up, down)
        report = result.report
        frontend.moved(sent, [*report.changed, *report.remote], up, down)
        return result

    def _left_alone(self, run: str, error: LinkClosed) -> MlinfraError:
        """What to say of a run whose machine cannot be reached any more."""
        machine = self._machine
        if machine is not None:
            status = portal().call(machine.provider.status(machine.handle))
            if not status.alive:
                self._local.forget(f"its machine has ended: {status.reason}")
                return MachineLost(
                    f"The machine {machine.name} has ended: {status.reason}.",
                    hint="The next run starts another one and sends its variables.",
                )
        return RunDetached(
            f"The machine cannot be reached: {error.message} The run goes on there as {run}.",
            hint=f"`%remote attach {run}` brings it back.",
        )

    def _submit(
        self,
        client: AgentClient,
        run: Running,
        code: str,
        inputs: Inputs,
        count: int,
        frontend: Frontend,
        ledger_run: int,
    ) -> None:
        request = m.Execute(
            client.next_id(),
            self._kernel,
            run.name,
            code,
            _encode_inputs(inputs),
            count,
            frontend.allow_stdin,
            notebook=self._notebook,
            ledger=ledger_run,
        )
        run.submitted(client.send(request))

    def _finish(
        self, client: AgentClient, outcome: Outcome, apply: Callable[[Outputs], Report]
    ) -> Result:
        """Take over what the run changed."""
        outputs = _decode_outputs(outcome.outputs)
        if not self._shared_store:
            with interrupts_raised():
                client.download(outputs.digests())
        report = apply(outputs)
        reply = outcome.reply
        report.warnings[:0] = reply.get("warnings", [])
        result = Result(
            value=report.extra.get("_"), payload=reply.get("payload", []), report=report
        )
        if reply["status"] != "ok":
            result.traceback = reply.get("traceback", [])
            result.error = exception_of(reply, report.error)
            if reply.get("loading"):
                self._local.forget("its variables could not be loaded")
        return result

    def _fetch(self, token: str) -> Outputs:
        """The content of a RemoteValue."""
        with self._lock:
            generation = self._generation or self._former
            client = self._ready(Console())
            if self._generation != generation:
                raise RemoteValueLost("The kernel that held this value has ended.")
            request = m.Evaluate(client.next_id(), self._kernel, "fetch", [token])
            outputs = _decode_outputs(client.ask(request, bytes))
            if not self._shared_store:
                client.download(outputs.digests())
            return outputs

    def _ready(self, frontend: Frontend) -> AgentClient:
        """A connection to the machine, with a kernel that runs."""
        death, self._death = self._death, None
        if death is not None:
            self._kernel_died(death)
        client = self._connect(frontend)
        if not self._generation:
            frontend.phase("start")
            cwd = os.getcwd() if self._shared_store else ""
            info = client.ask(m.OpenKernel(client.next_id(), self._kernel, cwd), m.KernelInfo)
            if self._former and info.generation != self._former:
                self._local.forget("the remote kernel has ended")
            self._former = 0
            self._kernel, self._generation = info.kernel, info.generation
        return client

    async def _other(self, record: m.Record) -> None:
        if record.msg_type != m.DIED:
            self.comms(record)
        elif self._lock.acquire(blocking=False):
            try:
                self._kernel_died(record)
            finally:
                self._lock.release()
        else:  # another thread is at work with what has to be forgotten
            self._death = record

    def _kernel_died(self, record: m.Record) -> KernelDied:
        """Forget what only lived there, unless it is another process by now; gives the error for
        who waits for a run."""
        content = msgspec.json.decode(record.content)
        reason: str = content["reason"]
        if record.kernel == self._kernel and content.get("generation") == self._generation:
            self._forget_kernel(reason)
        return KernelDied(reason, hint="The next run starts a fresh one and sends its variables.")

    def _forget_kernel(self, reason: str) -> None:
        self._generation = self._former = 0
        self._local.forget(reason)

    def _connect(self, frontend: Frontend | None = None) -> AgentClient:
        frontend = frontend or Console()
        client = self._client
        if client is not None and client.cut_off:
            # Nothing is sent to a machine that may be gone: it would be in doubt what it has done.
            frontend.phase("reconnecting")
            while client.cut_off and client.closed is None:
                time.sleep(0.02)
        if client is not None and client.closed is None:
            return client
        frontend.phase("start")
        if client is not None:
            self._account_for_the_lost(frontend)
        with contextlib.suppress(MlinfraError, OSError):
            self._store.collect_garbage(_STORE_LIMIT)
        # The next machine has the same name: it takes over runs that this one may leave behind.
        self._name = self._name or self.request.machine or _new_name(self.request.on)
        machine = portal().call(lifecycle.acquire(self.request, self._name, self.ledger))
        self._machine = machine  # from now on closing this session stops it
        lifetime.opened(self)
        client = self._open_client(machine)
        client.listen_to_rest(self._other)
        info = client.ask(m.Describe(client.next_id()), m.AgentInfo)
        try:
            versions.check(machine.name, info)
        except VersionMismatch:
            client.close()
            lifetime.closed(self)
            self._machine = None
            portal().call(lifecycle.stop(machine, self.ledger, "its versions do not fit"))
            raise
        again = self._synced == machine.id
        self._client, self._synced = client, machine.id
        self._shared_store = info.store == self._store.id
        self._former, self._generation = self._generation or self._former, 0
        if not again:
            self._local.forget("its machine has ended")
            self._kernel, self._former = "", 0
            self._local = self._new_namespace(
                shared_fs=machine.provider.capabilities.shared_fs and not self.request.isolate
            )
        return client

    def _open_client(self, machine: LiveMachine) -> AgentClient:
        async def check() -> None:
            status = await machine.provider.status(machine.handle)
            if not status.alive:
                raise LinkClosed(f"The machine {machine.name} has ended: {status.reason}.")

        return AgentClient.open(
            portal(),
            lambda: machine.provider.connect(machine.handle),
            portal().call(machine.provider.secret(machine.handle)),
            self._store,
            self.request.reconnect,
            check,
        )

    def _disconnect(self, reason: str) -> None:
        client, self._client = self._client, None
        self._forget_kernel(reason)
        if client is not None:
            client.close()

    def _account_for_the_lost(self, frontend: Frontend) -> None:
        """The link is gone: find out why, and close the machine if it has ended."""
        machine = self._machine
        if machine is None:
            return
        status = portal().call(machine.provider.status(machine.handle))
        if not status.alive:
            self._machine = None
            self._disconnect("its machine has ended")
            self.ledger.machine_stopped(machine.id, reason=status.reason, at=status.ended_at)
            portal().call(machine.provider.stop(machine.handle))
            frontend.note(f"The machine {machine.name} had ended: {status.reason}.")

    def _open_run(self, number: int, kind: str, cell: str) -> None:
        """A ledger that cannot be written must not stop work that costs nothing more."""
        if self._machine is not None:
            with contextlib.suppress(LedgerError):
                self.ledger.open_run(
                    self._machine.id,
                    kind=kind,
                    notebook=self._notebook,
                    cell=cell,
                    number=number,
                )

    def _close_run(self, run: int, status: str, seconds: float, up: int, down: int) -> None:
        if run:
            with contextlib.suppress(LedgerError):
                self.ledger.close_run(
                    run, status=status, seconds=seconds, bytes_up=up, bytes_down=down
                )


class _NotBegun(Exception):
    """The kernel had ended before it could be given the run."""


def _status_of(result: Result) -> str:
    """For the ledger."""
    if isinstance(result.error, KeyboardInterrupt):
        return "interrupted"
    return "done" if result.error is None else "error"


def _new_name(target: str) -> str:
    return f"{target}-{secrets.token_hex(3)}"


def _new_number() -> int:
    """Of a run in the ledger: whoever collects the run closes it there, so it must be known before
    the ledger is written."""
    return secrets.randbits(52) + 1


def _transformed(code: str) -> str:
    """Code after IPython's input transformation, without a shell."""
    from IPython.core.inputtransformer2 import TransformerManager

    with contextlib.suppress(SyntaxError):
        return TransformerManager().transform_cell(code)
    return code
