"""Checkpoints between a kernel on a machine, its agent, and the client that follows its run.

The kernel tells of each checkpoint by a record of its run, so it is journaled and comes exactly
once, in order; the client fetches the chunks while the run goes on. Before a checkpoint is looked
for, the kernel asks the client for a newer one the same way, and waits for the agent's answer: a
file.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec

from mlinfra_sdk.checkpoints import announce, notice
from mlinfra_sdk.checkpoints.keep import Keep
from mlinfra_sdk.checkpoints.manifest import Manifest, decode, encode
from mlinfra_sdk.checkpoints.store import FOLDER_VARIABLE, CheckpointStore
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.worker import ending
from mlinfra_sdk.worker.records import CHECKPOINT, WANTED
from mlinfra_sdk.worker.runs import Run
from mlinfra_sdk.worker.watchdog import End

FOLDER = "checkpoints"
"""In a machine's folder."""
_ANSWERS = ".answers"
_LOOK_EVERY = 0.01
_PATIENCE = 60.0
"""Seconds that a kernel waits for a client that is away."""

Publish = Callable[[str, dict[str, Any], list[bytes]], None]


class Saved(msgspec.Struct):
    """The content of a :data:`CHECKPOINT` record; its one buffer is the manifest."""

    name: str
    step: int
    created: float
    size: int
    keep: Keep


class Wanted(msgspec.Struct):
    """The content of a :data:`WANTED` record: is there a newer checkpoint of ``name`` than that of
    the time ``created`` (Unix seconds; 0: none is here)?"""

    name: str
    created: float
    token: str


class KernelCheckpoints:
    """In a kernel: ``publish`` sends a record of the present run."""

    def __init__(self, publish: Publish) -> None:
        self._publish = publish
        announce.connect(self._saved, self._wanted)
        ending.when_ending(self._ending)

    def _saved(self, manifest: Manifest, keep: Keep) -> None:
        said = Saved(manifest.name, manifest.step, manifest.created, manifest.size, keep)
        self._publish(CHECKPOINT, msgspec.to_builtins(said), [encode(manifest)])

    def _wanted(self, store: CheckpointStore, name: str) -> None:
        folder = os.environ.get(FOLDER_VARIABLE)
        if not folder:  # checkpoints lie where the client's do
            return
        newest = store.latest(name, lambda text: None)
        token = secrets.token_hex(8)
        answer = Path(folder, _ANSWERS, token)
        question = Wanted(name, newest.created if newest is not None else 0.0, token)
        self._publish(WANTED, msgspec.to_builtins(question), [])
        while not answer.exists():
            time.sleep(_LOOK_EVERY)
        answer.unlink()

    def _ending(self, end: End) -> None:
        if end.seconds > 0 and end.cause != "idle":
            notice.give(f"It ends in {end.seconds:.0f} s: {end.reason}.")


class AgentCheckpoints:
    """In the agent: checkpoints in the machine's ``folder``."""

    def __init__(self, folder: Path, chunks: ChunkStore) -> None:
        self.folder = folder / FOLDER
        self._store = CheckpointStore(self.folder, chunks)
        self._answers = self.folder / _ANSWERS
        self._asked: dict[str, anyio.Event] = {}

    async def asked(self, content: bytes, run: Run | None) -> None:
        """A kernel waits for an answer, which nobody gives if no client keeps its checkpoints."""
        token = msgspec.json.decode(content, type=Wanted).token
        answered = self._asked[token] = anyio.Event()
        away = 0
        while run is not None and run.kept and away < _PATIENCE:
            with anyio.move_on_after(1):
                await answered.wait()
                break
            away = 0 if run.keeper is not None else away + 1
        del self._asked[token]
        await anyio.to_thread.run_sync(self._answer, token)

    async def place(self, token: str, manifest: bytes) -> None:
        """The client's answer: a newer checkpoint, whose chunks are here, or nothing."""
        if manifest:
            await anyio.to_thread.run_sync(self._store.commit, decode(manifest))
        if token in self._asked:
            self._asked[token].set()

    def _answer(self, token: str) -> None:
        self._answers.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self._answers / token).touch()
