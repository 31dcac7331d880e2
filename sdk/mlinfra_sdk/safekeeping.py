"""Checkpoints of a session's runs: brought here while the runs go on, and to the next machine."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from mlinfra_sdk import units
from mlinfra_sdk.checkpoints.keep import Keep
from mlinfra_sdk.checkpoints.manifest import Manifest, decode, encode
from mlinfra_sdk.checkpoints.store import CheckpointStore
from mlinfra_sdk.errors import MlinfraError
from mlinfra_sdk.frontend import Frontend
from mlinfra_sdk.machines.client import AgentClient, Sink
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.checkpoints import Saved, Wanted
from mlinfra_sdk.worker.records import CHECKPOINT, WANTED, Record

logger = logging.getLogger(__name__)

_MOST_TRIES = 3
"""How often a run is begun again without having come further than the time before."""


class Safe:
    """What is safe of one run, whatever becomes of its machine."""

    def __init__(self) -> None:
        self.manifest: Manifest | None = None
        self.spent = 0
        """Micro-USD that went into attempts that were lost."""
        self._tries = 0
        self._gone_on_from = 0.0

    def goes_on(self, recover: str) -> bool:
        """Whether the run, which was cut off, is to be begun again. One that keeps being cut off
        at the same place is not."""
        newest = self.manifest.created if self.manifest is not None else 0.0
        if recover == "no" or (recover == "checkpoint" and self.manifest is None):
            return False
        self._tries = 1 if newest > self._gone_on_from else self._tries + 1
        self._gone_on_from = newest
        return self._tries <= _MOST_TRIES


class Safekeeping:
    """The checkpoints of this user, as the runs of one session use them."""

    def __init__(self, folder: Path, chunks: ChunkStore) -> None:
        self._store = CheckpointStore(folder, chunks)
        self._next: dict[tuple[AgentClient, str], tuple[Manifest, Keep]] = {}
        """The newest checkpoint of each name that waits to be fetched."""
        self._changed = threading.Condition()
        self._fetching: set[tuple[AgentClient, str]] = set()

    def sink(self, client: AgentClient, frontend: Frontend, safe: Safe, onward: Sink) -> Sink:
        """Takes records of checkpoints and passes the others on; for :meth:`AgentClient.listen`."""

        async def take(record: Record) -> None:
            if record.msg_type == CHECKPOINT:
                saved = msgspec.json.decode(record.content, type=Saved)
                manifest = decode(record.buffers[0])
                key = client, manifest.name
                self._next[key] = manifest, saved.keep
                if key not in self._fetching:
                    self._fetching.add(key)
                    portal().start(self._fetch(key, frontend, safe))
            elif record.msg_type == WANTED:
                question = msgspec.json.decode(record.content, type=Wanted)
                portal().start(self._give(client, question))
            else:
                await onward(record)

        return take

    async def _fetch(self, key: tuple[AgentClient, str], frontend: Frontend, safe: Safe) -> None:
        """Bring the newest checkpoint here, and again while there is a newer one."""
        client, _ = key
        try:
            while key in self._next:
                manifest, keep = self._next.pop(key)
                try:
                    await client.bring(list(manifest.chunks()))
                    await anyio.to_thread.run_sync(self._store.commit, manifest, keep)
                except MlinfraError as error:  # the link is gone, or it was pruned over there
                    logger.info("Checkpoint %s was not brought here: %s", manifest, error)
                else:
                    safe.manifest = manifest
                    frontend.safe(manifest.name, manifest.step, manifest.created)
        finally:
            self._fetching.discard(key)
            with self._changed:
                self._changed.notify_all()

    def settle(self, client: AgentClient) -> None:
        """Wait until what this machine has told of is here, or cannot come any more, in any thread
        but the portal's. Before that nobody knows what is safe of a run that was lost."""
        with self._changed:
            while any(it is client for it, _ in list(self._fetching)):
                self._changed.wait()

    async def _give(self, client: AgentClient, question: Wanted) -> None:
        """Answer a kernel that is going to look for a checkpoint."""
        placed = b""
        with contextlib.suppress(MlinfraError):
            try:
                newest = await anyio.to_thread.run_sync(
                    self._store.latest, question.name, logger.warning
                )
                if newest is not None and newest.created > question.created:
                    await client.give(list(newest.chunks()))
                    placed = encode(newest)
            finally:
                client.send(m.PlaceCheckpoint(client.next_id(), question.token, placed))


def marker(error: MlinfraError, safe: Safe) -> str:
    """What stands in a cell's output where it was cut off and began again."""
    manifest = safe.manifest
    if manifest is None:
        return f"\n[{error.message} The cell begins again, from its start.]\n"
    age = units.format_duration(time.time() - manifest.created)
    return (
        f"\n[{error.message} The cell begins again and goes on from checkpoint {manifest}, "
        f"saved {age} before.]\n"
    )
