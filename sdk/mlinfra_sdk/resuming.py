"""Runs on a session's machine that nobody waits for are begun again when that is lost by accident.

Whoever has the session's lock next does it: a thread that is started for that, a cell that has just
found the next machine, or a question about runs.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time

from mlinfra_sdk.errors import (
    KernelDied,
    LinkClosed,
    LinkError,
    Lost,
    MlinfraError,
    ProviderError,
    RunDetached,
)
from mlinfra_sdk.exchange import Exchange, NotBegun, encode_inputs, new_number
from mlinfra_sdk.frontend import Frontend
from mlinfra_sdk.jobs import Job, LostJob, Unseen
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.safekeeping import marker
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.records import ENDS, RESULT, Record

logger = logging.getLogger(__name__)


class Resuming(Exchange):
    """Begins jobs, and begins them again."""

    def _begin(
        self,
        client: AgentClient,
        job: Job,
        shown_by: Frontend,
        *,
        again: bool = False,
        said: str = "",
    ) -> None:
        """Hand a job, whose inputs the machine has, to a kernel; ``said`` is to stand first in its
        journal. Raises :class:`NotBegun`."""
        kernel = self._kernel
        if job.own_kernel:
            kernel = client.ask(self._opening(client, ""), m.KernelInfo).kernel
        name, former = job.name, job.run
        if former:  # it may be known here too, as one that was lost, and has the same name
            client.send(m.Collected(client.next_id(), former)).result()
        job.run, job.ledger_run = secrets.token_hex(4), new_number()
        job.machine, job.began = self._machine, time.monotonic()
        run = job.run

        async def take(record: Record) -> None:
            if record.msg_type in ENDS:
                await self._job_ended(job, run, client, record)
            else:
                await job.take(record)

        def closed(error: LinkClosed) -> None:
            self._job_cut_off(job, run, client, error)

        client.listen(run, self._safekeeping.sink(client, shown_by, job.safe, take))
        client.when_closed(closed)
        request = m.Execute(
            client.next_id(),
            kernel,
            run,
            job.code,
            encode_inputs(job.inputs),
            job.count,
            label=name,
            notebook=self._notebook,
            ledger=job.ledger_run,
            detached=job.frontend is None,
            again=again,
            said=said,
            watch=self._files.watched(job.request.checkpoints),
            **self._spending.of_run(job.safe.spent),
        )
        self._jobs[run] = job
        job.watched = True
        try:
            client.send(request).result()
        except BaseException as error:
            if self._jobs.pop(run, None) is None:  # it has begun, and been lost: that is seen to
                return
            job.run, job.watched = "", False
            if not isinstance(error, KernelDied):
                raise
            self._forget_kernel(error.message)
            raise NotBegun from error
        self._open_run(job.ledger_run, "cell", job.cell)

    # -- in the portal's thread ----------------------------------------------------------------

    async def _job_ended(self, job: Job, run: str, client: AgentClient, end: Record) -> None:
        if end.msg_type == RESULT:
            self._jobs.pop(run, None)
            job.watched = False
            await job.take(end)
        else:
            self._job_cut_off(job, run, client, end)

    def _job_cut_off(
        self, job: Job, run: str, client: AgentClient, end: Record | LinkClosed
    ) -> None:
        if self._jobs.pop(run, None) is None:  # it has ended, or is not this session's any more
            if isinstance(end, LinkClosed) and job.run == run and job.background is not None:
                job.background.fail(end)
            return
        self._lost_jobs.append(LostJob(job, client, end))
        threading.Thread(target=self._see_to_jobs, name="mlinfra-resume", daemon=True).start()

    # -- in any other one ----------------------------------------------------------------------

    def _see_to_jobs(self) -> None:
        with self._lock:
            if self._lost_jobs:
                self._go_on_with_jobs()

    def _go_on_with_jobs(self) -> None:
        while self._lost_jobs:
            job, client, end = self._lost_jobs.pop(0)
            try:
                self._go_on_with(job, self._cut_off_by(job, client, end))
            except (MlinfraError, OSError) as error:
                logger.info("The run %s ends: %s", job.name, error)
                if job.background is not None and not isinstance(error, RunDetached):
                    self.discard(job)  # who attaches another one is told then
                job.fail(error)

    def discard(self, job: Job) -> None:
        """Its machine, if that is there, may forget a job that has no result."""
        client = self.client
        if client is not None and job.run:
            client.send(m.Collected(client.next_id(), job.run))

    def _cut_off_by(self, job: Job, client: AgentClient, end: Record | LinkClosed) -> MlinfraError:
        """Why a job has no result."""
        self._safekeeping.settle(client)
        if isinstance(end, LinkClosed):
            return self._left_alone(job.machine, job.name, end)
        return self._reason(client, end)

    def _go_on_with(self, job: Job, error: MlinfraError) -> None:
        """Begin it again, on the next machine if that was lost; raises ``error`` if it is not to
        be, and other ones if it cannot be."""
        if not isinstance(error, RunDetached):  # that goes on
            seconds = time.monotonic() - job.began
            job.safe.spent += job.cost(seconds)
            self._close_run(job.ledger_run, "lost", seconds, 0, 0)
        accident = isinstance(error, Lost) and error.by_accident
        while accident and job.safe.goes_on(job.request.recover):
            try:
                self._begin_again(job, marker(error, job.safe))
            except (Lost, LinkError, ProviderError) as next_error:  # the next one is lost, too
                error = next_error
            except NotBegun:
                pass
            else:
                return
        raise error

    def _begin_again(self, job: Job, said: str) -> None:
        unseen = Unseen()
        shown_by = job.frontend or unseen
        shown_by.allow_stdin = False  # whoever sits there has gone on to something else
        job.say(said)
        configured, self.request = self.request, job.request
        try:
            with self._spending.going_on():
                self._spending.cell = job.cell
                client, _ = self._prepared(lambda: job.inputs, job.modules, shown_by)
                self._spending.before_run(shown_by, all_of_it=job.frontend is None)
                self._place_data(client, shown_by)
                self._files.before_run(self.request, shown_by)
                self._upload(client, job.inputs, shown_by)
                self._local.abandon()
                shown_by.phase("running")
                lines = [said.rstrip(), _NOT_KEPT, *unseen.notes, ""]
                journaled = "\n".join(lines) if job.frontend is None else ""
                self._begin(client, job, shown_by, again=True, said=journaled)
        finally:
            self.request = configured


_NOT_KEPT = "[What it had printed until then is not kept.]"
