"""Runs on a session's machine: those that are waited for, and those that go on by themselves."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable

import msgspec

from mlinfra_sdk import sources, spec
from mlinfra_sdk.connection import Connection, decode_outputs
from mlinfra_sdk.errors import (
    BudgetSpent,
    ChunkCorrupt,
    ChunkMissing,
    KernelDied,
    LinkClosed,
    Lost,
    MachineLost,
    MlinfraError,
    ProviderError,
    RequestError,
    RunCancelled,
    RunDetached,
    StoreError,
)
from mlinfra_sdk.frontend import Console, Frontend
from mlinfra_sdk.jobs import Background, RunHandle
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.namespace.analysis import CellNames
from mlinfra_sdk.namespace.delta import Inputs, Outputs
from mlinfra_sdk.namespace.imports import modules_of
from mlinfra_sdk.namespace.sync import Report
from mlinfra_sdk.running import (
    Outcome,
    Result,
    Running,
    exception_of,
    follow,
    interrupts_held,
    interrupts_raised,
)
from mlinfra_sdk.safekeeping import Safe, marker
from mlinfra_sdk.sync.reports import Report as FilesReport
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.watchdog import OF_BUDGET, by_design

_OF_LEDGER = ("done", "error", "interrupted")
_encode_inputs = msgspec.msgpack.Encoder().encode


_WITH_FILES = ("cell", "call")
"""Kinds of runs that may read and write files."""


class Exchange(Connection):
    """Sends what a run needs, follows it, and takes over what it changed."""

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

            def prepare() -> Inputs:
                return self._local.prepare(names, code)

            shown_by = frontend or Console()
            self._spending.cell = cell
            client, supply = self._prepared(prepare, names.imports, shown_by)
            self._spending.before_run(shown_by, all_of_it=frontend is None)
            self._place_data(client, shown_by)
            self._files.before_run(self.request, shown_by)
            try:
                if new_kernel:
                    self._local.abandon()
                    supply = prepare
                inputs = self._supply(client, supply, shown_by)
            finally:
                self._local.abandon()
            run, kernel = secrets.token_hex(4), self._kernel
            if new_kernel:
                kernel = client.ask(self._opening(client, ""), m.KernelInfo).kernel
            background = None
            ledger_run = _new_number()
            if frontend is not None:
                background = Background(frontend.publish, ledger_run)
                sink = self._safekeeping.sink(client, frontend, Safe(), background.sink)
                client.listen(run, sink)
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
                **self._spending.of_run(),
            )
            try:
                client.send(request).result()
            except KernelDied as error:
                self._forget_kernel(error.message)
                raise _NotBegun from error
            self._open_run(ledger_run, "cell", cell)
            if background is not None:
                self._backgrounds[run] = background
            else:
                self._unattended = True
            return RunHandle(self, run, label, background)

    def _prepared(
        self, prepare: Callable[[], Inputs], imports: frozenset[str], frontend: Frontend
    ) -> tuple[AgentClient, Callable[[], Inputs]]:
        """A connection to a kernel that can import what the run needs, and ``prepare``, whose
        first result may be known by now."""
        known: list[Inputs] = []

        def needs() -> set[str]:
            known[:] = [prepare()]
            return modules_of(self._local.met()).union(imports, self._needed)

        client = self._ready(frontend, needs)
        self._local.eager_limit = self.request.eager_limit
        if not known and self._packages.active:
            self._packages.add(client, needs(), frontend)
        return client, lambda: known.pop() if known else prepare()

    def runs(self) -> list[m.RunInfo]:
        """What runs, waits or has ended on the machine and has not been collected."""
        with self._lock:
            client = self._connect()
            try:
                known = client.ask(m.ListRuns(client.next_id()), list[m.RunInfo])
            except LinkClosed:  # the machine has just ended; another one may know them
                client = self._connect()
                known = client.ask(m.ListRuns(client.next_id()), list[m.RunInfo])
            for info in known:  # the machine has had nothing to do for them since their end
                if info.ended:
                    status = info.status if info.status in _OF_LEDGER else "lost"
                    self._close_run(info.ledger, status, info.ended - info.started, 0, 0)
            return known

    def cancel(self, run: str) -> None:
        """Interrupt a run, take it out of the queue, or discard what it has left."""
        with self._lock:
            self.runs()  # one that has ended is forgotten there: it is closed here before
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
            self._unattended = False
            frontend.begun(info.label or info.run)
            frontend.phase("running")
            background = self._backgrounds.pop(info.run, None)
            if background is not None:
                background.fail(RunDetached(f"The run {run} is shown where it was attached to."))
            sink = self._safekeeping.sink(client, frontend, Safe(), following.sink)
            client.listen(info.run, sink)
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
        self._bring_files(result, Console())
        client.send(m.Collected(client.next_id(), info.run))
        seconds = (info.ended or time.time()) - info.started
        self._close_run(info.ledger, _status_of(result), seconds, 0, 0)
        self._measured(info.ledger, result.usage)
        return result

    def _until_end(
        self, client: AgentClient, run: Running, frontend: Frontend, ledger_run: int
    ) -> Outcome:
        """Follow a run to its end; without a result this raises."""
        began = time.monotonic()
        try:
            ended = follow(client, self._kernel, run, frontend, self._spending.look)
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
        if content.get("machine"):
            self._kernel_died(end)
            return _ended(f"The machine has ended: {content['machine']}.", content["machine"])
        if status == "lost":
            return MachineLost(reason, hint="What it had published until then has been shown.")
        return self._kernel_died(end)

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

    def _execute(
        self,
        code: str,
        prepare: Callable[[], Inputs],
        *,
        frontend: Frontend,
        count: int,
        kind: str,
        cell: str = "",
        imports: frozenset[str] = frozenset(),
    ) -> Result:
        safe, again = Safe(), False
        with self._lock:
            while True:
                try:
                    return self._tried(
                        lambda again=again: self._exchange(  # type: ignore[misc]
                            code, prepare, frontend, count, kind, cell, imports, safe, again
                        )
                    )
                except (MachineLost, KernelDied, ProviderError) as error:
                    # The next machine may be lost too, even before it has started.
                    accident = error.by_accident if isinstance(error, Lost) else again
                    if not accident or not safe.goes_on(self.request.recover):
                        raise
                    again = True
                    content = {"name": "stderr", "text": marker(error, safe)}
                    encoded = msgspec.json.encode(content)
                    frontend.publish(m.Record(self._kernel, "", 0, "stream", encoded))

    def _tried(self, exchange: Callable[[], Result]) -> Result:
        """A run that could not begin, for its kernel or its variables were lost, is tried again."""
        try:
            return exchange()
        except (_NotBegun, _NotLoaded):
            pass
        try:
            return exchange()
        except _NotLoaded as error:
            raise ChunkCorrupt(error.message, hint="Its disk may be broken.") from None

    def _exchange(
        self,
        code: str,
        prepare: Callable[[], Inputs],
        frontend: Frontend,
        count: int,
        kind: str,
        cell: str,
        imports: frozenset[str],
        safe: Safe,
        again: bool,
    ) -> Result:
        self._spending.cell = cell
        client, prepare = self._prepared(prepare, imports, frontend)
        self._spending.before_run(frontend)
        self._place_data(client, frontend)
        before = client.bytes_sent, client.bytes_received
        if kind in _WITH_FILES:
            self._files.before_run(self.request, frontend)
        inputs = self._supply(client, prepare, frontend)
        run = Running(secrets.token_hex(4), portal(), frontend.publish)
        client.listen(run.name, self._safekeeping.sink(client, frontend, safe, run.sink))
        ledger_run = _new_number()
        began = time.monotonic()
        status = "lost"
        sent = sorted({name for group in inputs.groups for name in group.names})
        # What has begun on the machine is also ended there: an interrupt waits for its turn.
        with interrupts_held(run):
            try:
                frontend.begun(run.name)
                frontend.phase("running")
                self._submit(client, run, code, inputs, count, frontend, ledger_run, safe, again)
                self._open_run(ledger_run, kind, cell)  # while the machine is at work
                outcome = self._until_end(client, run, frontend, 0)
                result = self._finish(client, outcome, self._local.apply, frontend.progress)
                with contextlib.suppress(KeyboardInterrupt), interrupts_raised():
                    self._safekeeping.settle(client)
                client.send(m.Collected(client.next_id(), run.name))
                status = _status_of(result)
                if run.stopped and isinstance(result.error, KeyboardInterrupt):
                    result.error = BudgetSpent(run.stopped, hint=_RAISE)
            except _NotLoaded:
                client.send(m.Collected(client.next_id(), run.name))
                raise
            except Lost:
                safe.spent += self._spending.cost(time.monotonic() - began)
                raise
            except (RunDetached, KeyboardInterrupt):
                status = ""  # it goes on over there, and whoever collects it closes it
                raise
            finally:
                up, down = client.bytes_sent - before[0], client.bytes_received - before[1]
                if status:
                    self._close_run(ledger_run, status, time.monotonic() - began, up, down)
        self._measured(ledger_run, result.usage)
        received = [*result.report.changed, *result.report.remote]
        if kind in _WITH_FILES:
            files = self._bring_files(result, frontend)
            sent, received = sent + files.went, received + files.received
            up, down = client.bytes_sent - before[0], client.bytes_received - before[1]
        frontend.moved(sent, received, up, down)
        return result

    def _place_data(self, client: AgentClient, frontend: Frontend) -> None:
        """Have the datasets of the request on the machine."""
        request, files = self.request, self._files
        if request.data:
            frontend.phase("data")
            for path in sources.inside(request.data, files.root):
                files.exclude(files.root / path)
            with self._recorded(client, "up", "datasets"):
                self._placed.place(
                    client,
                    request.data,
                    frontend.progress,
                    files.root,
                    workspace=files.name if request.sync else "",
                    credentials=request.data_credentials,
                    in_place=self._shared_store,
                )

    def _supply(
        self, client: AgentClient, prepare: Callable[[], Inputs], frontend: Frontend
    ) -> Inputs:
        """What a run needs, with all its chunks on the machine. A chunk that was damaged in this
        side's store is made anew from the variables."""
        try:
            return self._upload(client, prepare(), frontend)
        except (ChunkCorrupt, ChunkMissing):
            return self._upload(client, prepare(), frontend)

    def _upload(self, client: AgentClient, inputs: Inputs, frontend: Frontend) -> Inputs:
        if not self._shared_store and (digests := inputs.digests()):
            frontend.phase("data")
            client.upload(digests, frontend.progress)
        return inputs

    def _bring_files(self, result: Result, frontend: Frontend) -> FilesReport:
        """What the run has written, and a word about what stays away."""
        files = self._files.after_run(self.request, frontend)
        result.report.warnings += files.warnings
        return files

    def _left_alone(self, run: str, error: LinkClosed) -> MlinfraError:
        """What to say of a run whose machine cannot be reached any more."""
        machine = self._machine
        if machine is not None:
            status = portal().call(machine.provider.status(machine.handle))
            if not status.alive:
                self._local.forget(f"its machine has ended: {status.reason}")
                return _ended(
                    f"The machine {machine.name} has ended: {status.reason}.", status.reason
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
        safe: Safe,
        again: bool,
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
            **self._spending.of_run(safe.spent),
            again=again,
        )
        run.submitted(client.send(request))

    def _finish(
        self,
        client: AgentClient,
        outcome: Outcome,
        apply: Callable[[Outputs], Report],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Result:
        """Take over what the run changed."""
        reply = outcome.reply
        if reply.get("loading") and reply["ename"] in _LOST:
            self._local.forget("its variables could not be loaded")
            raise _NotLoaded(reply["evalue"])
        outputs = decode_outputs(outcome.outputs)
        if not self._shared_store:
            sizes = outputs.chunks()
            with interrupts_raised():
                client.download(list(sizes), progress, sizes)
        report = apply(outputs)
        report.warnings[:0] = reply.get("warnings", [])
        result = Result(
            value=report.extra.get("_"),
            payload=reply.get("payload", []),
            report=report,
            usage=outcome.usage,
        )
        if reply["status"] != "ok":
            result.traceback = reply.get("traceback", [])
            result.error = exception_of(reply, report.error)
            if reply.get("loading"):
                self._local.forget("its variables could not be loaded")
        return result


class _NotBegun(Exception):
    """The kernel had ended before it could be given the run."""


class _NotLoaded(StoreError):
    """The cell did not run: chunks of its variables were damaged or missing on the machine, and
    are sent again with the next try."""


def _ended(said: str, reason: str) -> MlinfraError:
    if reason.startswith(OF_BUDGET):
        return BudgetSpent(said, hint=_RAISE)
    lost = MachineLost(said, hint="The next run starts another one and sends its variables.")
    lost.by_accident = not by_design(reason)
    return lost


_RAISE = "Raise it on the cell or by %remote use to go on."
_LOST = (ChunkCorrupt.__name__, ChunkMissing.__name__)


def _status_of(result: Result) -> str:
    """For the ledger."""
    if isinstance(result.error, KeyboardInterrupt):
        return "interrupted"
    return "done" if result.error is None else "error"


def _new_number() -> int:
    """Of a run in the ledger: whoever collects the run closes it there, so it must be known before
    the ledger is written."""
    return secrets.randbits(52) + 1
