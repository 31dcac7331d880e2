"""A run whose outputs appear while this process does something else."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Callable

from mlinfra_sdk.errors import KernelDied
from mlinfra_sdk.running import Outcome
from mlinfra_sdk.worker.messages import DIED, INPUT, RESULT, Record


class Background:
    """Publishes a run's records from the portal's thread; ``outcome`` is its end."""

    def __init__(self, publish: Callable[[Record], None]) -> None:
        self.outcome: concurrent.futures.Future[Outcome] = concurrent.futures.Future()
        self._publish = publish

    async def sink(self, record: Record) -> None:
        """Take a record."""
        if record.msg_type == RESULT:
            self.outcome.set_result(Outcome(json.loads(record.content), record.buffers[0]))
        elif record.msg_type == DIED:
            self.outcome.set_exception(KernelDied(json.loads(record.content)["reason"]))
        elif record.msg_type != INPUT:
            self._publish(record)

    def fail(self, error: BaseException) -> None:
        """The run cannot be followed any longer."""
        if not self.outcome.done():
            self.outcome.set_exception(error)
