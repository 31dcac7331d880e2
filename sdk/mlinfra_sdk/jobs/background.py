"""A run whose outputs appear while this process does something else."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Callable

import msgspec

from mlinfra_sdk.running import Outcome
from mlinfra_sdk.worker.records import INPUT, RESULT, USAGE, Record
from mlinfra_sdk.worker.run_usage import RunUsage


class Background:
    """Publishes a run's records from the portal's thread; ``ended`` is its outcome, or why it has
    none."""

    def __init__(self, publish: Callable[[Record], None]) -> None:
        self.ended: concurrent.futures.Future[Outcome] = concurrent.futures.Future()
        self._publish = publish
        self._usage: RunUsage | None = None

    async def sink(self, record: Record) -> None:
        """Take a record; of ends only that with a result."""
        if record.msg_type == RESULT:
            if not self.ended.done():
                outcome = Outcome(json.loads(record.content), record.buffers[0], self._usage)
                self.ended.set_result(outcome)
        elif record.msg_type != INPUT:
            if record.msg_type == USAGE:
                self._usage = msgspec.json.decode(record.content, type=RunUsage)
            self._publish(record)

    def fail(self, error: BaseException) -> None:
        """There will be no outcome."""
        if not self.ended.done():
            self.ended.set_exception(error)
