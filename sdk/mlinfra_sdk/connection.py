"""A session's connection: its machine, its kernel there, and what that knows of the variables."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import msgspec

from mlinfra_sdk import lifetime, paths, spec
from mlinfra_sdk.environment.mirror import Packages
from mlinfra_sdk.errors import (
    KernelDied,
    LedgerError,
    LinkClosed,
    LinkError,
    MlinfraError,
    RemoteValueLost,
    VersionMismatch,
    WrongGpu,
)
from mlinfra_sdk.frontend import Console, Frontend
from mlinfra_sdk.jobs import Job, LostJob
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.ledger.usage import measurements
from mlinfra_sdk.machines import ends, lifecycle, transfers, versions
from mlinfra_sdk.machines.accelerators import checked
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.machines.datasets import Placed
from mlinfra_sdk.machines.lifecycle import LiveMachine
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.machines.sweeper import sweeper
from mlinfra_sdk.namespace.delta import Outputs
from mlinfra_sdk.namespace.sync import LocalNamespace
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.providers.base import Status
from mlinfra_sdk.running import Running, follow
from mlinfra_sdk.safekeeping import Safekeeping
from mlinfra_sdk.spec import Request
from mlinfra_sdk.spending import Spending
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.records import DIED, ENDING, Record
from mlinfra_sdk.worker.run_usage import RunUsage
from mlinfra_sdk.worker.watchdog import End
from mlinfra_sdk.workspaces import SessionFiles

_STORE_LIMIT = 20 << 30
"""Bytes that the local chunk store may keep between sessions."""
_FAILURES = (MlinfraError, TimeoutError, concurrent.futures.TimeoutError)
"""What may go wrong in telling a machine that it is needed no longer."""
decode_outputs = msgspec.msgpack.Decoder(Outputs).decode


class Connection:
    """One machine and one kernel on it, as one notebook or script uses them. It is made with the
    first use, and made again when it was lost."""

    def __init__(
        self,
        *,
        namespace: dict[str, Any] | None = None,
        hidden: Callable[[], Iterable[str]] | None = None,
        request: Request | None = None,
        notebook: str = "",
        root: Path | None = None,
        trial: bool = False,
        **settings: object,
    ) -> None:
        if request is None:
            layer = spec.parse(settings, place=spec.NOTEBOOK, origin="the arguments of Session")
            request = spec.resolve([*spec.configured(), layer]).request
        self.request = request
        self.namespace = vars(sys.modules["__main__"]) if namespace is None else namespace
        self.comms: Callable[[Record], None] = lambda record: None
        """Takes what the kernel publishes beside any run: comm messages of widgets."""
        self.noticed: Callable[[End], None] = lambda end: Console().note(ends.notice(end))
        """Told, in the portal's thread, when the machine is about to end while nothing runs."""
        self._notebook = notebook
        self._spending = Spending(self, notebook)
        self._hidden = hidden or self._dunders
        self._ledger: Ledger | None = None
        self._store = ChunkStore(paths.data_dir() / "store")
        self._files = SessionFiles(root, self._store)
        self._trial = self._files.trial = trial
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
        self._death: Record | None = None
        self._ends: list[End] = []
        """What the machine has said of its ends, at the monotonic time ``_told``."""
        self._told = self._kept = 0.0
        self._jobs: dict[str, Job] = {}
        """Runs that were started here and have not ended, and nobody waits for, by their names on
        the machine."""
        self._lost_jobs: list[LostJob] = []
        """Of those, what was cut off and has not been seen to yet."""
        self._ended_with: dict[str, Status] = {}
        """How machines ended that were found to be gone, by their ids."""
        self._shared_store = False
        self._placed = Placed()
        self._local = self._new_namespace(shared_fs=False)
        self._shares_files = True
        """Whether the machine is this one, with the same folder and the same interpreter."""
        self._batch = False
        """Whether each run has a machine of its own (``Capabilities.channel``)."""
        self._packages = Packages(self._store)
        self._needed: set[str] = set()
        self._comms_passed = False
        self._safekeeping = Safekeeping(paths.data_dir() / "checkpoints", self._store)
        self._lock = threading.RLock()

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

    @property
    def client(self) -> AgentClient | None:
        """The connection to the machine's agent, if there is one."""
        client = self._client
        return client if client is not None and client.closed is None else None

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
        self._choose_packages()
        client = self._client
        if changed and client is not None and client.closed is None:
            client.send(m.Limit(client.next_id(), request.idle, request.time))
            self._learn(client.ask(m.Describe(client.next_id()), m.AgentInfo).ends)

    def next_end(self) -> End | None:
        """When the machine stops if nothing happens any more, as far as this side knows; None
        without a machine, or while something goes on there that nobody waits for."""
        if self._machine is None or self.client is None or self._jobs:
            return None
        now = time.monotonic()
        idle = self.request.idle
        found = [End("idle", max(idle, self._kept - now), f"idle for {idle:g} s")]
        found += self._spending.ends()
        found += [End(it.cause, it.seconds + self._told - now, it.reason) for it in self._ends]
        return min(found, key=lambda end: end.seconds)

    def _learn(self, told: list[End]) -> None:
        """Keep what the machine says of its ends; that for being idle is put off by each run."""
        self._told = time.monotonic()
        self._ends = [it for it in told if it.cause == "time"]

    def extend(self, seconds: float) -> list[End]:
        """Have the machine not end for being idle, nor for its time, before so many seconds from
        now; gives its ends, the next one first. Raises :class:`MlinfraError` without a machine."""
        client = self._client
        if client is None or client.closed is not None:
            raise MlinfraError(
                "There is no machine that could be kept.", hint="The next run starts one."
            )
        found = client.ask(m.Extend(client.next_id(), seconds), list[End])
        self._kept = max(self._kept, time.monotonic() + seconds)
        self._learn(found)
        return found

    def restart(self) -> None:
        """Give the machine a fresh kernel: variables that only lived there are lost."""
        client = self._connect()
        ending = [it for it in self._runs_left() if it.kernel == self._kernel and not it.ended]
        if self._packages.active:
            self._packages.renew(client, self._needed, Console())
        request = m.RestartKernel(client.next_id(), self._kernel, self._packages.key)
        info = client.ask(request, m.KernelInfo)
        for it in ending:
            client.send(m.Collected(client.next_id(), it.run))
            self._close_run(it.ledger, "lost", time.time() - it.started, 0, 0)
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
        self._give_up_jobs()
        machine, self._machine = self._machine, None
        client = self._client
        if machine is not None and client is not None and client.closed is None:
            with contextlib.suppress(*_FAILURES):  # what it runs for this session is not wanted
                client.send(m.Stop(client.next_id(), "stopped by the user")).result(5)
        self._files.forget()
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
            self._give_up_jobs()
            client, kernel = self._client, self._kernel
            if kernel not in kernels:
                with contextlib.suppress(*_FAILURES):
                    client.send(m.CloseKernel(client.next_id(), kernel)).result(5)
            self._disconnect("the session was closed")

    def _give_up_jobs(self) -> None:
        """What becomes of them from now on is not for this session to see to."""
        for job in [*self._jobs.values(), *(lost.job for lost in self._lost_jobs)]:
            job.watched = False
        self._jobs.clear()
        self._lost_jobs.clear()

    def abandon(self) -> None:
        """In a forked child: the machine is the parent's, the next run starts another one."""
        self._lock = threading.RLock()
        self._machine = self._client = self._ledger = self._death = None
        self._name = self._synced = ""
        self._generation = self._former = 0
        self._give_up_jobs()
        self._files.disconnected()
        self._local.forget("it belongs to the parent process")

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
            if isinstance(ended, Record) and ended.msg_type == DIED:
                raise self._kernel_died(ended)
        except MlinfraError as error:
            frontend.note(str(error))
        finally:
            client.ignore(parent)

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
            takes_ambient=not self._trial,
        )

    def _fetch(self, token: str) -> Outputs:
        """The content of a RemoteValue."""
        with self._lock:
            generation = self._generation or self._former
            client = self._ready(Console())
            if self._generation != generation:
                raise RemoteValueLost("The kernel that held this value has ended.")
            request = m.Evaluate(client.next_id(), self._kernel, "fetch", [token])
            outputs = decode_outputs(client.ask(request, bytes))
            if not self._shared_store:
                sizes = outputs.chunks()
                with self._recorded(client, "down", "value"):
                    client.download(list(sizes), sizes=sizes)
            return outputs

    def _recorded(
        self, client: AgentClient, direction: Literal["up", "down"], what: str
    ) -> AbstractContextManager[None]:
        """Have the ledger know what moves in that context."""
        if self._machine is None:
            return contextlib.nullcontext()
        return transfers.recorded(self.ledger, self._machine.id, client, direction, what)

    def need(self, modules: Iterable[str]) -> None:
        """Have the packages of these modules on the machine, which runs import unseen."""
        self._needed |= set(modules)

    def _ready(self, frontend: Frontend, needs: Callable[[], Iterable[str]] = tuple) -> AgentClient:
        """A connection to the machine, with a kernel that runs. ``needs`` is asked for the modules
        that a new kernel must be able to import."""
        death, self._death = self._death, None
        if death is not None:
            self._kernel_died(death)
        client = self._connect(frontend)
        for text in sweeper.news():
            frontend.note(text)
        if not self._generation:
            frontend.phase("start")
            if self._packages.active and not self._former:
                self._packages.renew(client, needs(), frontend)
                frontend.phase("start")
            info = client.ask(self._opening(client, self._kernel), m.KernelInfo)
            if self._former and info.generation != self._former:
                self._local.forget("the remote kernel has ended")
            self._former = 0
            self._kernel, self._generation = info.kernel, info.generation
            self._packages.take(info.environment)
        return client

    def _choose_packages(self) -> None:
        here = self._shares_files or self._batch
        self._packages.mode = "none" if here else self.request.env
        self._packages.credentials = self.request.index_credentials

    def _opening(self, client: AgentClient, kernel: str) -> m.OpenKernel:
        cwd = os.getcwd() if self._shared_store else ""
        return m.OpenKernel(client.next_id(), kernel, cwd, self._packages.key)

    async def _other(self, record: Record) -> None:
        if record.msg_type == ENDING:
            self.noticed(msgspec.json.decode(record.content, type=End))
        elif record.msg_type != DIED:
            self.comms(record)
        elif self._lock.acquire(blocking=False):
            try:
                self._kernel_died(record)
            finally:
                self._lock.release()
        else:  # another thread is at work with what has to be forgotten
            self._death = record

    def _kernel_died(self, record: Record) -> KernelDied:
        """Forget what only lived there, unless it is another process by now; gives the error for
        who waits for a run."""
        content = msgspec.json.decode(record.content)
        reason: str = content["reason"]
        if record.kernel == self._kernel and content.get("generation") == self._generation:
            self._forget_kernel(reason)
        error = KernelDied(reason, hint="The next run starts a fresh one and sends its variables.")
        error.by_accident = content.get("by_accident", False)
        return error

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
        if client is not None and client.closed is None and not self._seen_dead():
            return client
        frontend.phase("start")
        if client is not None:
            self._account_for_the_lost(frontend)
        with contextlib.suppress(MlinfraError, OSError):
            self._store.collect_garbage(_STORE_LIMIT)
        # The next machine has the same name: it takes over runs that this one may leave behind.
        self._name = self._name or self.request.machine or _new_name(self.request.target)
        if self.request.isolate or self.request.on != "local":
            self._packages.warm_up()
        machine = self._spending.acquire(self._name, frontend)
        self._shares_files = machine.provider.capabilities.shared_fs and not self.request.isolate
        self._batch = machine.provider.capabilities.channel == "batch"
        self._choose_packages()
        self._machine = machine  # from now on closing this session stops it
        lifetime.opened(self)
        client = self._open_client(machine)
        client.listen_to_rest(self._other)
        info = client.ask(m.Describe(client.next_id()), m.AgentInfo)
        try:
            versions.check(machine.name, info, only_sdk=self._packages.active)
            if not self._batch:  # there each run's own machine is asked, when it begins
                machine = checked(machine, self.request.gpu, client, frontend.note)
                self._machine = machine
        except (VersionMismatch, WrongGpu) as error:
            client.close()
            lifetime.closed(self)
            self._machine = None
            portal().call(lifecycle.stop(machine, self.ledger, error.message))
            raise
        frontend.placed(machine)
        self._learn(info.ends)
        again = self._synced == machine.id
        self._client, self._synced = client, machine.id
        self._shared_store = info.store == self._store.id
        self._former, self._generation = self._generation or self._former, 0
        sweeper.start(self.ledger)
        own_files = not (self._shares_files or self._batch)
        self._files.connected(client, machine, shared=not own_files, sync=self.request.sync)
        if not again:
            self._local.forget("its machine has ended")
            self._kernel, self._former = "", 0
            self._placed = Placed()
            self._local = self._new_namespace(shared_fs=self._shares_files)
            self._packages.moved()
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

    def _seen_dead(self) -> bool:
        """Whether the agent is known to be gone before the link has told so: a process of this
        computer that is killed keeps its sockets until the last of its threads has ended."""
        machine = self._machine
        if machine is None or not machine.provider.capabilities.shared_fs:
            return False
        return not portal().call(machine.provider.status(machine.handle)).alive

    def _account_for_the_lost(self, frontend: Frontend) -> None:
        """The link is gone: find out why, and close the machine if it has ended."""
        machine = self._machine
        if machine is None:
            return
        status = portal().call(machine.provider.status(machine.handle))
        if not status.alive:
            self._machine = None
            self._ended_with[machine.id] = status
            self._disconnect("its machine has ended")
            lifecycle.close_lost(self.ledger, machine, status)
            portal().call(machine.provider.stop(machine.handle))
            frontend.note(f"The machine {machine.name} had ended: {status.reason}.")

    def _runs_left(self) -> list[m.RunInfo]:
        """Runs on the machine that somebody may still want."""
        client = self._client
        if client is None or client.closed is not None:
            return []
        with contextlib.suppress(MlinfraError):
            return client.ask(m.ListRuns(client.next_id()), list[m.RunInfo])
        return []

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

    def _measured(self, run: int, usage: RunUsage | None) -> None:
        """Keep what a run has used, if that is known."""
        if run and usage is not None:
            with contextlib.suppress(LedgerError):
                self.ledger.measure(run, measurements(usage))


def _new_name(target: str) -> str:
    return f"{re.sub('[^A-Za-z0-9.-]+', '-', target)}-{secrets.token_hex(3)}"
