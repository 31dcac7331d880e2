"""What a user holds of a run that goes on by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from mlinfra_sdk.errors import MlinfraError
from mlinfra_sdk.jobs.job import Job
from mlinfra_sdk.worker.messages import RunInfo

if TYPE_CHECKING:
    from mlinfra_sdk.running import Outcome, Result
    from mlinfra_sdk.unattended import Unattended

_POLL = 0.5


class RunHandle:
    """A run on a machine, like a future: :meth:`result` waits for it, brings its variables here
    and gives the value of its last expression. It can be awaited too.

    What a detached run (without ``background``) has left is fetched at its end; one that its
    session does not watch any more is asked for.
    """

    def __init__(self, session: Unattended, job: Job) -> None:
        self.label = job.label
        self._session = session
        self._job = job
        self._background = job.background
        self._result: Result | None = None

    @property
    def run(self) -> str:
        """What its machine calls it: another name when it was begun again."""
        return self._job.run

    @property
    def name(self) -> str:
        """What ``%remote attach`` and its like call it."""
        return self._job.name

    def info(self) -> RunInfo | None:
        """How it is over there; None once it has been collected."""
        return next((it for it in self._session.runs() if it.run == self.run), None)

    def done(self) -> bool:
        """Whether it has ended."""
        if self._result is not None:
            return True
        if self._background is not None:
            return self._background.ended.done()
        if self._job.watched or self._job.failed is not None:
            return not self._job.watched
        info = self.info()
        return info is None or info.ended > 0

    def when_done(self, act: Callable[[], None]) -> None:
        """Call ``act`` in another thread at the end of a run that is followed."""
        if self._background is not None:
            self._background.ended.add_done_callback(lambda _: act())

    def ending(self) -> Outcome | BaseException | None:
        """How a run that is followed has ended, once it has: or why nothing more comes of it."""
        background = self._background
        if background is None or not background.ended.done():
            return None
        return background.ended.exception() or background.ended.result()

    def cancel(self) -> None:
        """Interrupt it, or take it out of the queue."""
        self._session.cancel(self.run)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for its end, at most ``timeout`` seconds; whether it has ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.done():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            time.sleep(_POLL if self._background is None else 0.05)
        return True

    def collect(self) -> Result:
        """Wait for its end and bring its variables here; what it raised is in the result."""
        if self._result is None:
            if self._background is not None:
                self._result = self._session.collect(self.run, self._background)
            elif self._job.failed is not None:
                self._session.discard(self._job)
                raise self._job.failed
            else:
                self._result = self._session.attach(self.run)
        return self._result

    def result(self, timeout: float | None = None) -> Any:
        """The value of its last expression; raises what it raised."""
        if not self.wait(timeout):
            raise MlinfraError(
                f"The run {self.name} has not ended within {timeout:g} s.",
                hint="It goes on; ask again later.",
            )
        result = self.collect()
        if result.error is not None:
            raise result.error
        return result.value

    def __await__(self) -> Generator[Any, None, Any]:
        return self._awaited().__await__()

    async def _awaited(self) -> Any:
        while not self.done():
            await asyncio.sleep(0.05)
        return self.result()

    def __repr__(self) -> str:
        # Not how it is: this is shown below the cell, and stays there.
        return f"<run {self.name}>"
