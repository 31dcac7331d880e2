"""A run whose outputs appear while this process does something else."""

from __future__ import annotations

import concurrent.futures
import json
import time
from collections.abc import Callable

import msgspec

from mlinfra_sdk.running import Outcome
from mlinfra_sdk.worker.messages import ENDS, INPUT, RESULT, USAGE, Record
from mlinfra_sdk.worker.run_usage import RunUsage


class Background:
    """Publishes a run's records from the portal's thread; ``ended`` is its outcome, or the record
    of another end."""

    def __init__(self, publish: Callable[[Record], None], ledger_run: int) -> None:
        self.ended: concurrent.futures.Future[Outcome | Record] = concurrent.futures.Future()
        self.ledger_run = ledger_run
        self.began = time.monotonic()
        self._publish = publish
        self._usage: RunUsage | None = None

    async def sink(self, record: Record) -> None:
        """Take a record."""
        if record.msg_type in ENDS:
            if not self.ended.done():
                self.ended.set_result(
                    Outcome(json.loads(record.content), record.buffers[0], self._usage)
                    if record.msg_type == RESULT
                    else record
                )
        elif record.msg_type != INPUT:
            if record.msg_type == USAGE:
                self._usage = msgspec.json.decode(record.content, type=RunUsage)
            self._publish(record)

    def fail(self, error: BaseException) -> None:
        """The run cannot be followed any longer."""
        if not self.ended.done():
            self.ended.set_exception(error)
