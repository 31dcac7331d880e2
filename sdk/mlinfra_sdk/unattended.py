"""Runs on a session's machine that go on by themselves: started, watched, attached, collected."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from mlinfra_sdk import spec
from mlinfra_sdk.errors import LinkClosed, Lost, RequestError, RunDetached
from mlinfra_sdk.exchange import NotBegun, status_of
from mlinfra_sdk.frontend import Console, Frontend
from mlinfra_sdk.jobs import Background, Job, RunHandle
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.namespace.analysis import CellNames
from mlinfra_sdk.namespace.delta import Inputs
from mlinfra_sdk.namespace.imports import modules_of
from mlinfra_sdk.resuming import Resuming
from mlinfra_sdk.running import Outcome, Result, Running, interrupts_held, interrupts_raised
from mlinfra_sdk.safekeeping import Safe
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.records import LEFT, Record

_OF_LEDGER = ("done", "error", "interrupted")


class Unattended(Resuming):
    """Also starts runs that nobody waits for, and brings them back."""

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
        come; without one they are not shown until :meth:`attach`. Runs of one kernel wait for each
        other; ``new_kernel`` gives it one of its own.

        While this session lasts its checkpoints come here, and it is begun again when its machine
        or kernel is lost by accident, as ``recover=`` says: with the variables that it got at its
        start."""
        background = None if frontend is None else Background(frontend.publish)
        job = Job(code, count, label, cell, new_kernel, self.request, frontend, background)
        with self._lock:
            try:
                return self._start(job, names)
            except NotBegun:
                return self._start(job, names)

    def _start(self, job: Job, names: CellNames) -> RunHandle:
        def prepare() -> Inputs:
            return self._local.prepare(names, job.code)

        shown_by = job.frontend or Console()
        self._local.abandon()  # it gets all of its inputs: those that are there may be lost
        self._spending.cell = job.cell
        client, supply = self._prepared(prepare, names.imports, shown_by)
        self._spending.before_run(shown_by, all_of_it=job.frontend is None)
        self._place_data(client, shown_by)
        self._files.before_run(self.request, shown_by)
        try:
            job.inputs = self._supply(client, supply, shown_by)
            job.modules = names.imports | modules_of(self._local.met())
        finally:
            self._local.abandon()
        job.hold(self._store)
        self._begin(client, job, shown_by)
        handle = RunHandle(self, job)
        job.label = job.name
        return handle

    def runs(self) -> list[m.RunInfo]:
        """What runs, waits or has ended on the machine and has not been collected."""
        with self._lock:
            self._go_on_with_jobs()
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
            frontend.begun(info.label or info.run)
            frontend.phase("running")
            job = self._jobs.pop(info.run, None)
            if job is not None:
                if job.background is not None:
                    shown = f"The run {run} is shown where it was attached to."
                    job.background.fail(RunDetached(shown))
                job.frontend = job.background = None
                job.watched = False
            safe = Safe() if job is None else job.safe
            sink = self._safekeeping.sink(client, frontend, safe, following.sink)
            client.listen(info.run, sink)
            client.send(m.Attach(client.next_id(), info.run, take=take)).result()
            try:
                with interrupts_held(following):
                    if self._kernel != info.kernel:
                        self._local.forget("this session has turned to another kernel")
                        self._kernel, self._generation = info.kernel, 0
                    outcome = self._until_end(client, following, frontend, info.ledger)
                    return self._take_over(client, info, outcome)
            except Lost as error:
                if job is None:
                    raise
                self._safekeeping.settle(client)
                self._go_on_with(job, error)
            return self.attach(job.name, frontend=frontend)

    def watch(self, run: str, publish: Callable[[Record], None], *, until_end: bool) -> None:
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
            if isinstance(end, Record) and end.msg_type == LEFT:
                raise self._failure(client, info.run, end)
        finally:
            client.close()

    def collect(self, run: str, background: Background) -> Result:
        """Wait for the end of a run in the background, take over its variables, and let the
        machine forget it."""
        try:
            outcome = background.ended.result()
        except LinkClosed as error:
            raise self._left_alone(self._machine, run, error) from None
        with self._lock:
            client = self._connect()
            return self._take_over(client, self._find_run(run), outcome)

    def _take_over(self, client: AgentClient, info: m.RunInfo, outcome: Outcome) -> Result:
        """The variables of a run that was not waited for from its beginning."""
        result = self._finish(client, outcome, self._local.adopt)
        self._bring_files(result, Console())
        with contextlib.suppress(KeyboardInterrupt), interrupts_raised():
            self._safekeeping.settle(client)
        client.send(m.Collected(client.next_id(), info.run))
        seconds = (info.ended or time.time()) - info.started
        self._close_run(info.ledger, status_of(result), seconds, 0, 0)
        self._measured(info.ledger, result.usage)
        return result

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
