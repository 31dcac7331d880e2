"""Who is told that something is about to end, and the end of runs whose budget is spent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress

import anyio
import anyio.abc
import msgspec

from mlinfra_sdk.errors import KernelDied
from mlinfra_sdk.worker.kernel_host import KernelHost
from mlinfra_sdk.worker.messages import Execute
from mlinfra_sdk.worker.records import ENDING, Record
from mlinfra_sdk.worker.runs import Run, Runs
from mlinfra_sdk.worker.watchdog import NOTICE, OF_BUDGET, End

GRACE = 15.0
"""Seconds that a run has to end after it was interrupted; then its kernel is ended."""


class Notices:
    """Tells the kernels, and by the runs' records their clients. ``tell`` reaches the client of a
    kernel in which nothing runs."""

    def __init__(
        self,
        runs: Runs,
        kernels: Callable[[], Iterable[KernelHost]],
        tell: Callable[[Record], Awaitable[None]],
        tasks: anyio.abc.TaskGroup,
    ) -> None:
        self._runs = runs
        self._kernels = kernels
        self._tell = tell
        self._tasks = tasks
        self._limited: dict[str, anyio.CancelScope] = {}
        """The runs that have a budget and have begun."""
        self._budgets: dict[str, Execute] = {}

    def machine(self, end: End) -> None:
        """The machine is about to end."""
        for kernel in self._kernels():
            self._tasks.start_soon(self._kernel, kernel, end)

    async def _kernel(self, kernel: KernelHost, end: End) -> None:
        await kernel.ending(msgspec.json.encode(end))
        runs = [run for name in kernel.running if (run := self._runs.get(name)) is not None]
        for run in runs:
            await run.publish(_record(kernel, run.info.run, end))
        if not runs:
            await self._tell(_record(kernel, "", end))

    def expect(self, request: Execute) -> None:
        """A run that is about to be given to its kernel, and may have a budget."""
        if request.paid is not None:
            self._budgets[request.run] = request

    def begun(self, kernel: KernelHost, run: Run) -> None:
        """The run's time counts from now on."""
        request = self._budgets.pop(run.info.run, None)
        if request is not None and request.paid is not None:
            self._tasks.start_soon(self._limit, kernel, run, request.paid, request.budget)

    def ended(self, run: str) -> None:
        """The run is over."""
        self._budgets.pop(run, None)
        scope = self._limited.pop(run, None)
        if scope is not None:
            scope.cancel()

    async def _limit(self, kernel: KernelHost, run: Run, seconds: float, budget: str) -> None:
        name = run.info.run
        reason = f"{OF_BUDGET}: {budget}"
        with anyio.CancelScope() as self._limited[name]:
            notice = min(NOTICE, seconds / 5)
            await anyio.sleep(seconds - notice)
            await self._run(kernel, run, End("run", notice, reason))
            await anyio.sleep(notice)
            await self._run(kernel, run, End("run", 0.0, reason))
            with suppress(KernelDied):
                kernel.interrupt()
                await anyio.sleep(GRACE)
                await kernel.kill(f"The run was stopped: {reason}.")

    async def _run(self, kernel: KernelHost, run: Run, end: End) -> None:
        await kernel.ending(msgspec.json.encode(end))
        await run.publish(_record(kernel, run.info.run, end))


def _record(kernel: KernelHost, run: str, end: End) -> Record:
    return Record(kernel.name, run, 0, ENDING, msgspec.json.encode(end))
