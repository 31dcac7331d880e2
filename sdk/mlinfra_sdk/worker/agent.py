"""The agent: hosts kernels on the machine, serves clients, and ends the machine in time."""

from __future__ import annotations

import importlib
import logging
import platform
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import msgspec

from mlinfra_sdk import paths
from mlinfra_sdk.checkpoints.store import FOLDER_VARIABLE
from mlinfra_sdk.errors import EnvironmentFailed, LinkClosed, MlinfraError, RequestError
from mlinfra_sdk.link.frames import Channel
from mlinfra_sdk.link.session import LinkSession
from mlinfra_sdk.link.state import State
from mlinfra_sdk.objects.bulk import Bulk
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.sources import VARIABLE
from mlinfra_sdk.worker import gpus, upkeep
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.checkpoints import AgentCheckpoints
from mlinfra_sdk.worker.datasets import Datasets
from mlinfra_sdk.worker.environments import Environments
from mlinfra_sdk.worker.files import Files
from mlinfra_sdk.worker.folder import Config, make_sockets, remove_sockets
from mlinfra_sdk.worker.kernel_host import KernelHost
from mlinfra_sdk.worker.monitor import Monitor
from mlinfra_sdk.worker.notices import Notices
from mlinfra_sdk.worker.recipe import Prepared
from mlinfra_sdk.worker.records import BEGUN, DIED, METERS, PREPARING, RESULT, WANTED, Record
from mlinfra_sdk.worker.runs import Run, Runs
from mlinfra_sdk.worker.usage import usage
from mlinfra_sdk.worker.versions import platform_here, versions
from mlinfra_sdk.worker.watchdog import Watchdog

logger = logging.getLogger(__name__)

_IN_ORDER = (m.Execute, m.Collected, m.Comm, m.Answer, m.Interrupt)
_NO_WORK = (
    *(m.Describe, m.ListRuns, m.Accelerators, m.AskPlatform, m.Limit, m.Pay, m.Extend, m.Observe),
)
"""What somebody asks who only looks, and does not keep an idle machine."""


class Agent:
    """All that one machine does for its clients."""

    def __init__(self, folder: Path, config: Config, tasks: anyio.abc.TaskGroup) -> None:
        self.folder = folder
        self.store = ChunkStore(Path(config.store))
        self.files = Files(folder, self.store)
        self.watchdog = Watchdog(
            config.limits, folder, busy=lambda: self.busy, connected=lambda: self.connected
        )
        self._sessions: set[LinkSession] = set()
        """Those of clients that want something, not only to observe."""
        self._prestarted = ""
        self._config = config
        self._sockets = make_sockets(folder)
        self._tasks = tasks
        self._kernels: dict[str, KernelHost] = {}
        self._listeners: dict[str, LinkSession] = {}
        """The session that follows each kernel."""
        self.runs = Runs(folder / "runs", config.journal_limit)
        self._notices = Notices(self.runs, lambda: [*self._kernels.values()], self._tell, tasks)
        self.watchdog.when_ending(self._notices.machine)
        self.monitor = Monitor(self._kernel)
        self._environments = Environments(
            paths.cache_dir() / "environments", folder / "environments", self.store
        )
        self._preparing: dict[str, anyio.CancelScope] = {}
        self._followers: dict[LinkSession, anyio.abc.TaskGroup] = {}
        """Where the tasks of a client run that send it what it follows."""
        self._datasets = Datasets(folder, self.store, config, tasks, self.files)
        self._checkpoints = AgentCheckpoints(folder, self.store)
        self._bulks: dict[LinkSession, Bulk] = {}
        self._fetches: dict[tuple[LinkSession, int], anyio.CancelScope] = {}

    @property
    def busy(self) -> bool:
        """Whether any kernel starts, runs a cell or handles a widget's event, or an environment
        is being made."""
        return bool(self._preparing) or any(
            kernel.starting or kernel.running or kernel.handling
            for kernel in self._kernels.values()
        )

    @property
    def connected(self) -> bool:
        """Whether any client is connected right now."""
        return any(session.status.state is State.CONNECTED for session in self._sessions)

    def prestart(self, kernel: str) -> None:
        """Begin to start a kernel that the first client is going to ask for."""
        self._prestarted = kernel
        self._tasks.start_soon(self._prestart, self._kernel(kernel))

    async def _prestart(self, kernel: KernelHost) -> None:
        try:
            await kernel.ensure()
        except MlinfraError:
            logger.exception("The kernel could not be started ahead")

    def _kernel(self, name: str) -> KernelHost:
        kernel = self._kernels.get(name)
        if kernel is None:
            env = {
                VARIABLE: str(self._datasets.links),
                m.STORE_VARIABLE: self._config.store,
                m.SHARED_VARIABLE: "1" if self._config.shared_fs else "0",
                m.WORKSPACES_VARIABLE: "" if self._config.shared_fs else str(self.files.folder),
            }
            if not self._config.shared_fs:
                env[FOLDER_VARIABLE] = str(self._checkpoints.folder)
            kernel = self._new_host(name, env)
            kernel.cwd = self._config.cwd
            self._kernels[name] = kernel
        return kernel

    def _new_host(self, name: str, env: dict[str, str]) -> KernelHost:
        usual = (name, self._sockets, env, self._tasks, self._publish)
        module, _, kind = self._config.host.partition(":")
        if not module:
            return KernelHost(*usual)
        host: KernelHost = getattr(importlib.import_module(module), kind)(
            *usual, self._config.host_options
        )
        return host

    async def close(self) -> None:
        """End all kernels."""
        for kernel in self._kernels.values():
            await kernel.close(self.watchdog.reason or "")
        remove_sockets(self.folder)

    async def on_session(self, session: LinkSession) -> None:
        """Serve one client until its session is closed."""
        try:
            async with anyio.create_task_group() as tasks:
                self._followers[session] = tasks
                bulk = self._bulks[session] = Bulk(session, self.store)
                tasks.start_soon(bulk.receive)
                async for message in session.receive(Channel.CONTROL):
                    request = m.decode_request(message.data)
                    if not isinstance(request, m.Observe):
                        self._sessions.add(session)
                        self.watchdog.heard()
                    if not isinstance(request, _NO_WORK):
                        self.watchdog.touch()
                    # What is passed on to the kernel keeps its order; the rest may take a while.
                    if isinstance(request, _IN_ORDER):
                        await self._answer(session, request)
                    else:
                        tasks.start_soon(self._answer, session, request)
                tasks.cancel_scope.cancel()
        finally:
            self._sessions.discard(session)
            self._followers.pop(session, None)
            self._bulks.pop(session, None)
            self.runs.forget(session)
            self.files.forget(session)
            self._forget(session)

    def _forget(self, session: LinkSession) -> None:
        for name in [name for name, it in self._listeners.items() if it is session]:
            del self._listeners[name]

    async def _answer(self, session: LinkSession, request: m.AnyRequest) -> None:
        try:
            reply = m.Reply(request.id, m.encode_result(await self._do(session, request)))
        except MlinfraError as error:
            reply = m.Reply(
                request.id, error=error.message, hint=error.hint, kind=type(error).__name__
            )
        except FileExistsError:
            reply = m.Reply(request.id, error="A run of this name is under way.")
        except OSError as error:
            if self.watchdog.reason is None:
                text, kind = f"The machine failed: {error}.", "StoreError"
            else:  # what it needs is being cleared away
                text, kind = f"The machine has ended: {self.watchdog.reason}.", "MachineLost"
            reply = m.Reply(request.id, error=text, kind=kind)
        await session.send(Channel.CONTROL, m.encode(reply))

    async def _do(self, session: LinkSession, request: m.AnyRequest) -> Any:
        match request:
            case m.Execute():
                await self._execute(session, request)
            case m.Attach():
                return self._attach(session, request)
            case m.Leave():
                run = self.runs.get(request.run)
                if run is not None:
                    run.leave(session)
            case m.Collected():
                run = self.runs.get(request.run)
                if run is not None:
                    self.runs.collect(run)
            case m.Cancel():
                await self._cancel(self.runs.find(request.run))
            case m.ListRuns():
                return list(self.runs.listed())
            case m.Comm():
                await self._kernel(request.kernel).comm(
                    request.parent,
                    request.msg_type,
                    request.content,
                    request.metadata,
                    request.buffers,
                )
            case m.Answer():
                await self._kernel(request.kernel).answer(request.text)
            case m.Interrupt():
                self._kernel(request.kernel).interrupt()
            case m.OpenKernel():
                kernel = self._kernel(request.kernel or self._unused_kernel(request.environment))
                kernel.cwd = request.cwd or kernel.cwd
                self._listeners[kernel.name] = session
                if not kernel.alive:
                    self._give_environment(kernel, request.environment)
                await kernel.ensure()
                return self._info(kernel)
            case m.RestartKernel():
                kernel = self._kernel(request.kernel)
                self._give_environment(kernel, request.environment)
                await kernel.restart()
                return self._info(kernel)
            case m.CloseKernel():
                kernel = self._kernel(request.kernel)
                await kernel.close()
                del self._kernels[request.kernel]
            case m.AskPlatform():
                return await anyio.to_thread.run_sync(platform_here)
            case m.Prepare():
                return await self._prepare(session, request)
            case m.GiveUp():
                if request.name in self._preparing:
                    self._preparing[request.name].cancel()
            case m.Evaluate():
                return await self._kernel(request.kernel).evaluate(request.what, request.arguments)
            case m.Missing():
                return await anyio.to_thread.run_sync(self.store.missing, request.digests)
            case m.Await():
                await self._bulks[session].passed(request.mark)
                return await anyio.to_thread.run_sync(self.store.missing, request.digests)
            case m.Fetch():
                return await self._fetch(session, request)
            case m.Halt():
                scope = self._fetches.get((session, request.fetch))
                if scope is not None:
                    scope.cancel()
            case (
                m.FetchDataset()
                | m.WatchDataset()
                | m.DropDataset()
                | m.LinkDataset()
                | m.UseDataset()
                | m.OfferFiles()
                | m.WriteFiles()
                | m.FinishDataset()
            ):
                return await self._datasets.do(request)
            case m.PlaceCheckpoint():
                await self._checkpoints.place(request.token, request.manifest)
            case m.Files():
                return await self.files.answer(session, request.body)
            case m.Limit():
                self.watchdog.limit(idle=request.idle, time=request.time)
            case m.Pay():
                self.watchdog.pay(request.seconds, request.budget)
            case m.Extend():
                self.watchdog.extend(request.seconds)
                return self.watchdog.ends()
            case m.Stop():
                self.runs.renounce(session)
                self.watchdog.end(request.reason)
            case m.Describe():
                return m.AgentInfo(
                    versions(),
                    self.store.id,
                    self.watchdog.started,
                    self.busy,
                    self.watchdog.idle_seconds,
                    sorted(self._kernels),
                    self.watchdog.ends(),
                )
            case m.Observe():
                return await self._observed()
            case m.Accelerators():
                return await anyio.to_thread.run_sync(gpus.present)
        return None

    async def _prepare(self, session: LinkSession, request: m.Prepare) -> Prepared:
        def tell(text: str) -> None:
            record = Record("", request.name, 0, PREPARING, msgspec.json.encode({"text": text}))
            with suppress(LinkClosed):  # of what is only news, some may get lost
                session.send_nowait(Channel.JOURNAL, m.encode(record))

        with anyio.CancelScope() as scope:
            self._preparing[request.name] = scope
            try:
                return await self._environments.prepare(
                    request.recipe,
                    tell=tell,
                    indexes=request.indexes,
                    key=request.key,
                    onto=request.onto,
                )
            finally:
                del self._preparing[request.name]
        raise EnvironmentFailed("The environment was given up.")

    def _give_environment(self, kernel: KernelHost, environment: str) -> None:
        if environment:
            kernel.interpreter = self._environments.python(environment)
            kernel.environment = environment

    def _unused_kernel(self, environment: str) -> str:
        """The one that was started ahead, or a new one."""
        name = ""
        if not environment:
            name, self._prestarted = self._prestarted, ""
        while not name or (name in self._kernels and name in self._listeners):
            name = f"k{secrets.token_hex(3)}"
        return name

    async def _execute(self, session: LinkSession, request: m.Execute) -> None:
        kernel = self._kernel(request.kernel)
        self._listeners[request.kernel] = session
        lines = [line for line in request.code.splitlines() if line.strip()]
        title = next((line for line in lines if not line.startswith("#")), "")[:120]
        run = self.runs.add(
            m.RunInfo(
                request.run,
                request.kernel,
                time.time(),
                label=request.label,
                notebook=request.notebook,
                title=title,
                ledger=request.ledger,
                generation=kernel.generation,
            )
        )
        upkeep.pin_inputs(self.store, request.run, run.journal.folder, request.inputs)
        self._notices.expect(request)
        self._follow(run, session, 0, owns=not request.detached, keeps=True)
        if request.said:
            content = msgspec.json.encode({"name": "stderr", "text": request.said})
            await run.publish(Record(request.kernel, request.run, 0, "stream", content))
        try:
            await kernel.execute(request)
        except MlinfraError:
            self.runs.collect(run)
            raise

    def _follow(
        self, run: Run, session: LinkSession, after: int, *, owns: bool, keeps: bool
    ) -> None:
        follower = run.admit(session, after, owns=owns, keeps=keeps)
        self._followers[session].start_soon(run.follow, follower)

    def _attach(self, session: LinkSession, request: m.Attach) -> m.RunInfo:
        run = self.runs.find(request.run)
        taken = run.owner not in (None, session)
        if taken and not (request.take or request.watch):
            raise RequestError(
                f"The run {request.run!r} is followed by another notebook.",
                hint="Close that one, or attach with `take`.",
            )
        if not request.watch:
            self._listeners[run.info.kernel] = session
        owns = not request.watch
        self._follow(run, session, request.after, owns=owns, keeps=owns)
        return run.info

    async def _cancel(self, run: Run) -> None:
        kernel = self._kernel(run.info.kernel)
        if run.info.status == "queued" and await kernel.withdraw(run.info.run):
            return
        if run.info.status in ("queued", "running"):
            kernel.interrupt()
        else:
            self.runs.collect(run)

    async def _observed(self) -> m.Observed:
        return m.Observed(
            self.busy,
            self.watchdog.idle_seconds,
            self.watchdog.ends(),
            list(self.runs.listed()),
            await anyio.to_thread.run_sync(usage),
        )

    def _info(self, kernel: KernelHost) -> m.KernelInfo:
        python = platform.python_version()
        return m.KernelInfo(kernel.name, kernel.generation, kernel.pid, python, kernel.environment)

    async def _fetch(self, session: LinkSession, request: m.Fetch) -> m.Fetched | None:
        key = session, request.id
        with anyio.CancelScope() as self._fetches[key]:
            try:
                source = self.files.source(session)
                sent = self._bulks[session].send(
                    request.digests, source=source, verify=request.verify
                )
                return m.Fetched(*await sent)
            finally:
                del self._fetches[key]
        return None

    async def _tell(self, record: Record) -> None:
        """What belongs to no run goes to the kernel's client; one that is away must not hold the
        kernel up."""
        session = self._listeners.get(record.kernel)
        if session is None:
            return
        data = m.encode(record)
        with suppress(LinkClosed):
            if session.status.state is State.CONNECTED:
                await session.send(Channel.JOURNAL, data)
            elif not session.send_nowait(Channel.JOURNAL, data):
                logger.warning("A %s of no run is dropped: the client is away", record.msg_type)

    async def _publish(self, record: Record) -> None:
        """Take a message of a kernel: into its run's journal, or straight to the kernel's client
        if it belongs to no run."""
        run = self.runs.get(record.parent)
        if run is None:
            if record.msg_type == WANTED:
                await self._checkpoints.asked(record.content, None)
                return
            await self._tell(record)
            return
        if record.msg_type == BEGUN:
            run.info.status = "running"
            self._notices.begun(self._kernel(record.kernel), run)
            self.monitor.begun(run)
            return
        if record.msg_type == METERS:
            self.monitor.counted(record.parent, record.content)
            return
        if record.msg_type in (RESULT, DIED):
            usage = self.monitor.ended(record.parent)
            if usage is not None:
                await run.publish(usage)
        if record.msg_type == WANTED:
            self._tasks.start_soon(self._checkpoints.asked, record.content, run)
        if record.msg_type == RESULT:
            upkeep.pin_outputs(self.store, run.info.run, run.journal.folder, record.buffers[0])
        await run.publish(record)
        if record.msg_type in (RESULT, DIED):
            self.watchdog.touch()
            self._notices.ended(record.parent)
            self.runs.ended(run, record)
