"""What an agent has in place of a kernel: each run is pushed to Kaggle, and what it publishes is
taken from its log while it runs, and from what it has left at its end."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from mlinfra_sdk.catalog import parse_gpus
from mlinfra_sdk.errors import KernelDied, LinkError, MlinfraError, ProviderError
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.providers.kaggle import script, service
from mlinfra_sdk.worker import batch
from mlinfra_sdk.worker.journal import Gap
from mlinfra_sdk.worker.kernel_host import KernelHost, Publish
from mlinfra_sdk.worker.messages import STORE_VARIABLE, Execute
from mlinfra_sdk.worker.records import BEGUN, DIED, RESULT, Record

_LOOK_FIRST, _LOOK_LAST = 1.0, 15.0
"""Seconds between two looks: at first, and later."""
_AGAIN_FIRST, _AGAIN_LAST = 1.0, 60.0
"""Seconds until a log that has ended or cannot be had is asked for again: after news, and without
any for long."""
_GIVE_BACK = 60.0


class Settings(msgspec.Struct, frozen=True):
    """How runs are pushed: the words of ``gpu=``, the limit in seconds, and what they may use."""

    key: str
    gpu: str
    seconds: int
    datasets: tuple[str, ...]
    internet: bool


class KaggleHost(KernelHost):
    """Its kernel lives for one run: the next one gets all its variables again."""

    def __init__(
        self,
        name: str,
        sockets: Path,
        env: Mapping[str, str],
        tasks: anyio.abc.TaskGroup,
        publish: Publish,
        options: str,
    ) -> None:
        super().__init__(name, sockets, env, tasks, publish)
        self._store = ChunkStore(Path(env[STORE_VARIABLE]))
        self._settings = msgspec.json.decode(options, type=Settings)
        self._fresh = False
        self._scopes: dict[str, anyio.CancelScope] = {}
        self._idle = anyio.Event()
        self._idle.set()

    @property
    def alive(self) -> bool:
        """Whether a run may be given to it."""
        return self._fresh

    async def ensure(self) -> None:
        """The next run's kernel."""
        if not self._fresh:
            self.generation += 1
            self._fresh = True

    async def restart(self) -> None:
        """Cancel what runs; the next run has a kernel of its own anyway."""
        await self.close()
        await self.ensure()

    async def close(self, machine: str = "") -> None:
        """Cancel what runs, and wait until Kaggle has been told."""
        self.interrupt()
        await self._idle.wait()
        self._fresh = False

    async def kill(self, reason: str) -> None:
        """Cancel what runs."""
        await self.close()

    async def execute(self, request: Execute) -> None:
        """Push a cell. Runs do not wait for each other."""
        if not self._fresh:
            raise KernelDied("Each run at Kaggle has a kernel of its own.")
        gpu = parse_gpus(self._settings.gpu)
        run, job = request.run, batch.Job(request, gpu, "kaggle")
        title = f"mlinfra-{self._settings.key[:8]}-{run}"
        place = tempfile.TemporaryDirectory(prefix="mlinfra-")
        extra = Path(place.name) / title
        try:
            text = await anyio.to_thread.run_sync(script.compose, job, self._store, extra)
        except BaseException:
            place.cleanup()
            raise
        self._fresh = False
        self.running.add(run)
        await self._publish(Record(self.name, run, 0, BEGUN))
        reason = {"reason": "Each run has a kernel of its own.", "generation": self.generation}
        await self._publish(Record(self.name, "", 0, DIED, json.dumps(reason).encode()))
        scope = self._scopes[run] = anyio.CancelScope()
        self._idle = anyio.Event()
        self._tasks.start_soon(self._carry, run, title, text, place, scope)

    async def _carry(
        self,
        run: str,
        title: str,
        text: str,
        place: tempfile.TemporaryDirectory[str],
        scope: anyio.CancelScope,
    ) -> None:
        """From the push to the last record. Whatever fails is how the run ended. What lies in
        ``place`` is sent as a dataset of the same title before."""
        settings, datasets = self._settings, list(self._settings.datasets)
        user, reason = "", "The run was cancelled."
        uploads = any(Path(place.name).iterdir())
        try:
            with scope:
                if uploads:
                    datasets.append(await service.upload(title, Path(place.name)))
                    place.cleanup()
                with anyio.CancelScope(shield=True):  # half a push could not be found again
                    user = await service.push(
                        title,
                        text,
                        shape="NvidiaTeslaT4" if settings.gpu != "none" else "",
                        seconds=settings.seconds,
                        datasets=datasets,
                        internet=settings.internet,
                    )
                reason = await self._until_over(run, user, title)
        except MlinfraError as error:
            reason = str(error)
        except Exception as error:  # of this one run; the agent goes on
            reason = f"{type(error).__name__}: {error}"
        finally:
            with anyio.CancelScope(shield=True):
                place.cleanup()
                if user:
                    await _remove(partial(service.delete, user, title))
                if uploads:
                    await _remove(partial(service.drop, title))
                if reason:
                    content = json.dumps({"reason": reason}).encode()
                    await self._emit(run, DIED, content, b"{}", [])
                del self._scopes[run]
                if not self._scopes:
                    self._idle.set()

    async def _until_over(self, run: str, user: str, title: str) -> str:
        """Wait, and replay what the run has left; why there is no result, or nothing."""
        log = batch.Log()
        following = _Following()
        pause = _LOOK_FIRST
        try:
            while True:
                with suppress(LinkError):  # what cannot be asked now goes on there
                    state = await service.state(user, title)
                    if state.over:
                        break
                    if state.status == "RUNNING" and not following.begun:
                        following.begun = True
                        self._tasks.start_soon(self._follow, run, user, title, log, following)
                with anyio.move_on_after(pause):
                    await following.all.wait()
                    following.all = anyio.Event()
                    pause = _LOOK_FIRST
                pause = min(pause * 1.5, _LOOK_LAST)
        finally:
            await following.stop()
        with tempfile.TemporaryDirectory(prefix="mlinfra-") as place:
            folder = Path(place)
            fetched = await service.fetch(user, title, script.OUTPUT, folder)
            if not fetched.found:
                said = f" {state.failure}".rstrip()
                raise ProviderError(
                    f"Kaggle's run ended without a result ({state.status.lower()}).{said} "
                    f"{fetched.log}".strip()
                )
            archive = folder / script.OUTPUT
            for record in await anyio.to_thread.run_sync(
                lambda: list(batch.unpack(archive, folder, self._store, after=log.number))
            ):
                if isinstance(record, Gap):
                    continue
                await self._emit(
                    run, record.msg_type, record.content, record.metadata, record.buffers
                )
                if record.msg_type in (RESULT, DIED):
                    return ""
        raise ProviderError("The result that Kaggle gave is not whole.")

    async def _follow(
        self, run: str, user: str, title: str, log: batch.Log, following: _Following
    ) -> None:
        """Give on what the run's log shows, until it is stopped. What the log does not show comes
        at the run's end, so nothing that is wrong with it matters to the run."""

        async def take(text: str) -> None:
            for record in log.read(text):
                with anyio.CancelScope(shield=True):  # it counts as shown by now
                    await self._emit(run, record.msg_type, record.content, record.metadata, [])

        pause = _AGAIN_FIRST
        try:
            with following.scope:
                while True:
                    before = log.number
                    log.rewind()
                    with suppress(Exception):
                        await service.follow(user, title, take)
                        following.all.set()
                    pause = _AGAIN_FIRST if log.number > before else min(pause * 2, _AGAIN_LAST)
                    await anyio.sleep(pause)
        finally:
            following.ended.set()

    async def withdraw(self, run: str) -> bool:
        """Nothing waits here."""
        return False

    async def evaluate(self, what: str, arguments: list[str]) -> bytes:
        """Nothing is kept between runs."""
        raise KernelDied("Nothing is kept at Kaggle between runs.")

    async def comm(
        self, parent: str, msg_type: str, content: bytes, metadata: bytes, buffers: list[bytes]
    ) -> None:
        """Nobody listens there."""
        raise KernelDied("Widgets cannot reach a run at Kaggle.")

    async def answer(self, text: str) -> None:
        """Never asked for."""

    async def ending(self, content: bytes) -> None:
        """It cannot be told."""

    def interrupt(self) -> None:
        """Cancel all runs: a service without a channel knows no milder way."""
        for scope in self._scopes.values():
            scope.cancel()


class _Following:
    """A task that follows a log, if it has been begun."""

    def __init__(self) -> None:
        self.begun = False
        self.all = anyio.Event()
        """The log seems to be complete: a look is worth it."""
        self.scope = anyio.CancelScope()
        self.ended = anyio.Event()

    async def stop(self) -> None:
        self.scope.cancel()
        if self.begun:
            with anyio.CancelScope(shield=True):
                await self.ended.wait()


async def _remove(what: Callable[[], Awaitable[None]]) -> None:
    """Remove what was pushed or sent. If that fails for long, it stays on the account's page; what
    runs ends by its own limit."""
    with anyio.move_on_after(_GIVE_BACK):
        while True:
            try:
                await what()
            except LinkError:
                await anyio.sleep(_LOOK_FIRST)
            except MlinfraError:
                return
            else:
                return
