"""Watches the runs of an agent: a reading each second to who follows them, and the sum at the end.

A run that ends within its first two seconds is not looked at, so short cells cost nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import anyio
import anyio.to_thread
import msgspec

from mlinfra_sdk.meters import Meter, outermost
from mlinfra_sdk.worker.kernel_host import KernelHost
from mlinfra_sdk.worker.readings import Probe, cores_here
from mlinfra_sdk.worker.records import METRICS, USAGE, Record
from mlinfra_sdk.worker.run_usage import Sums
from mlinfra_sdk.worker.runs import Run

logger = logging.getLogger(__name__)

EVERY = 1.0
"""Seconds between two readings."""


class Monitor:
    """Takes the readings of all runs that are under way."""

    def __init__(self, kernel: Callable[[str], KernelHost]) -> None:
        self._kernel = kernel
        self._watched: dict[str, _Watched] = {}

    def begun(self, run: Run) -> None:
        """A run was handed to its kernel."""
        self._watched[run.info.run] = _Watched(run, anyio.current_time())

    def counted(self, run: str, content: bytes) -> None:
        """A kernel tells how far the loops of a run are."""
        watched = self._watched.get(run)
        if watched is not None:
            watched.meters = msgspec.json.decode(content, type=dict[str, list[Meter]])["meters"]
            watched.run.info.progress = outermost(watched.meters)

    def ended(self, run: str) -> Record | None:
        """A run is over: what it has used, if it was looked at."""
        watched = self._watched.pop(run, None)
        if watched is None:
            return None
        watched.run.info.progress = None
        if watched.sums is None and not watched.meters:
            return None
        sums = watched.sums or Sums(cores_here())
        sums.count(watched.meters)
        content = msgspec.json.encode(sums.usage)
        return Record(watched.run.info.kernel, run, 0, USAGE, content)

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            await anyio.sleep(EVERY)
            now = anyio.current_time()
            for watched in list(self._watched.values()):
                if now - watched.since >= EVERY / 2:
                    try:
                        await self._look(watched)
                    except Exception:  # a figure that cannot be had must not end the machine
                        logger.exception("The run %s is not looked at", watched.run.info.run)
                        watched.since = float("inf")

    async def _look(self, watched: _Watched) -> None:
        run = watched.run
        kernel = self._kernel(run.info.kernel)
        if not kernel.alive:
            return
        await kernel.count(run.info.run)
        first = watched.probe is None
        probe = watched.probe = watched.probe or Probe(kernel.pid)
        reading = await anyio.to_thread.run_sync(probe.read)
        if first or reading is None or run.info.run not in self._watched:
            return
        reading.meters = watched.meters
        watched.sums = watched.sums or Sums(cores_here())
        watched.sums.add(reading)
        run.tell(Record(kernel.name, run.info.run, 0, METRICS, msgspec.json.encode(reading)))


class _Watched:
    """A run that is looked at."""

    def __init__(self, run: Run, since: float) -> None:
        self.run = run
        self.since = since
        self.probe: Probe | None = None
        self.sums: Sums | None = None
        self.meters: list[Meter] = []
