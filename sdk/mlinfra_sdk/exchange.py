"""Runs on a session's machine that are waited for."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable

import msgspec

from mlinfra_sdk import sources
from mlinfra_sdk.connection import Connection, decode_outputs
from mlinfra_sdk.errors import (
    BudgetSpent,
    ChunkCorrupt,
    ChunkMissing,
    KernelDied,
    LinkClosed,
    LinkError,
    Lost,
    MachineLost,
    MlinfraError,
    ProviderError,
    RunCancelled,
    RunDetached,
    StoreError,
)
from mlinfra_sdk.frontend import Frontend
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.machines.lifecycle import LiveMachine
from mlinfra_sdk.machines.portal import portal
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
from mlinfra_sdk.worker.records import DIED, LEFT, Record
from mlinfra_sdk.worker.watchdog import OF_BUDGET, by_design

encode_inputs = msgspec.msgpack.Encoder().encode


_WITH_FILES = ("cell", "call")
"""Kinds of runs that may read and write files."""


class Exchange(Connection):
    """Sends what a run needs, follows it, and takes over what it changed."""

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

    def _until_end(
        self, client: AgentClient, run: Running, frontend: Frontend, ledger_run: int
    ) -> Outcome:
        """Follow a run to its end; without a result this raises."""
        began = time.monotonic()
        try:
            ended = follow(client, self._kernel, run, frontend, self._spending.look)
        except LinkClosed as error:
            raise self._left_alone(self._machine, run.name, error) from None
        except KernelDied as error:
            self._forget_kernel(error.message)
            raise NotBegun from error
        if isinstance(ended, Outcome):
            return ended
        if ended.msg_type == DIED:
            self._close_run(ledger_run, "lost", time.monotonic() - began, 0, 0)
        raise self._failure(client, run.name, ended)

    def _failure(self, client: AgentClient, run: str, end: Record) -> MlinfraError:
        """The same as :meth:`_reason`; if nothing more comes of the run, the machine may forget
        it."""
        if end.msg_type != LEFT:
            client.send(m.Collected(client.next_id(), run))
        return self._reason(client, end)

    def _reason(self, client: AgentClient, end: Record) -> MlinfraError:
        """What to say of a run that has no result."""
        content = msgspec.json.decode(end.content)
        reason, status = content["reason"], content.get("status")
        if end.msg_type == LEFT:
            return RunDetached(reason, hint="`%remote runs` lists what is still there.")
        if status == "cancelled":
            return RunCancelled(reason)
        if content.get("machine"):
            self._kernel_died(end)
            client.wait_gone(_LAST_MOMENTS)  # until then it is there, and takes no more requests
            return _ended(f"The machine has ended: {content['machine']}.", content["machine"])
        if status == "lost":
            return MachineLost(reason, hint="What it had published until then has been shown.")
        return self._kernel_died(end)

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
        with self._lock, contextlib.ExitStack() as until_then:
            while True:
                try:
                    return self._tried(
                        lambda again=again: self._exchange(  # type: ignore[misc]
                            code, prepare, frontend, count, kind, cell, imports, safe, again
                        )
                    )
                except (Lost, LinkError, ProviderError) as error:
                    # The next machine may be lost too, even before it has started.
                    accident = error.by_accident if isinstance(error, Lost) else again
                    if not accident or not safe.goes_on(self.request.recover):
                        raise
                    again = True
                    until_then.enter_context(self._spending.going_on())
                    content = {"name": "stderr", "text": marker(error, safe)}
                    encoded = msgspec.json.encode(content)
                    frontend.publish(Record(self._kernel, "", 0, "stream", encoded))

    def _tried(self, exchange: Callable[[], Result]) -> Result:
        """A run that could not begin, for its kernel or its variables were lost, is tried again."""
        try:
            return exchange()
        except (NotBegun, _NotLoaded):
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
        self._go_on_with_jobs()
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
        ledger_run = new_number()
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
                status = status_of(result)
                if run.stopped and isinstance(result.error, KeyboardInterrupt):
                    result.error = BudgetSpent(run.stopped, hint=_RAISE)
            except _NotLoaded:
                client.send(m.Collected(client.next_id(), run.name))
                raise
            except Lost:
                self._safekeeping.settle(client)
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

    def _go_on_with_jobs(self) -> None:
        """Begin again what was lost of the runs that nobody waits for: see ``Resuming``."""

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

    def _left_alone(self, machine: LiveMachine | None, run: str, error: LinkClosed) -> MlinfraError:
        """What to say of a run whose machine cannot be reached any more."""
        if machine is not None:
            status = self._ended_with.get(machine.id) or portal().call(
                machine.provider.status(machine.handle)
            )
            if not status.alive:
                if machine.id == self._synced:
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
            encode_inputs(inputs),
            count,
            frontend.allow_stdin,
            notebook=self._notebook,
            ledger=ledger_run,
            **self._spending.of_run(safe.spent),
            again=again,
            watch=self._files.watched(self.request.checkpoints),
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


class NotBegun(Exception):
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


_LAST_MOMENTS = 10.0
"""Seconds that an agent may take from the end of its kernels to its own."""
_RAISE = "Raise it on the cell or by %remote use to go on."
_LOST = (ChunkCorrupt.__name__, ChunkMissing.__name__)


def status_of(result: Result) -> str:
    """For the ledger."""
    if isinstance(result.error, KeyboardInterrupt):
        return "interrupted"
    return "done" if result.error is None else "error"


def new_number() -> int:
    """Of a run in the ledger: whoever collects the run closes it there, so it must be known before
    the ledger is written."""
    return secrets.randbits(52) + 1
