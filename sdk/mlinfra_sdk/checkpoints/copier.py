"""Copying to an object store beside the training: a slow or dead store never holds a loop."""

from __future__ import annotations

import contextlib
import threading

from mlinfra_sdk.checkpoints.keep import Keep
from mlinfra_sdk.checkpoints.manifest import Manifest
from mlinfra_sdk.checkpoints.mirror import Mirror
from mlinfra_sdk.checkpoints.store import CheckpointStore
from mlinfra_sdk.errors import StoreError


class Copier:
    """Sends checkpoints to a mirror in a thread of its own, one at a time. Of those that come while
    one is on its way, only the newest follows."""

    def __init__(self, mirror: Mirror, store: CheckpointStore, keep: Keep) -> None:
        self._mirror = mirror
        self._store = store
        self._keep = keep
        self._changed = threading.Condition()
        self._next: Manifest | None = None
        self._under_way: Manifest | None = None
        self._running = False
        self._error: StoreError | None = None
        self._told = False

    def offer(self, manifest: Manifest) -> None:
        """Have this checkpoint, which is in the store, copied soon."""
        with self._changed:
            # A later save may let go of it here before it has been sent.
            wanted = set(manifest.chunks())
            if self._under_way is not None:
                wanted.update(self._under_way.chunks())
            with contextlib.suppress(StoreError):
                owner = self._store.root / manifest.name
                self._store.chunks.pin(self._pin(manifest), wanted, owner)
            self._next = manifest
            if not self._running:
                self._running = True
                # A daemon: who ends the process does not wait for a store that does not answer.
                threading.Thread(target=self._work, name="mlinfra-copier", daemon=True).start()

    def pull(self) -> None:
        """See :meth:`Mirror.pull`; a failure counts as told to the user."""
        try:
            self._mirror.pull(self._store)
        except StoreError:
            with self._changed:
                self._told = True
            raise

    def wait(self, seconds: float) -> StoreError | None:
        """Until nothing is left to be copied, at most so long; gives what kept the newest
        checkpoint from it."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._running, seconds):
                return StoreError(
                    f"A checkpoint is still being copied to {self._mirror.url}.",
                    hint="It goes on while this process lives.",
                )
            return self._error

    def news(self, patience: float = 0.0) -> StoreError | None:
        """What to tell the user, after having waited so long: the first failure since a copy
        succeeded, or what is still under way then."""
        left = self.wait(patience) if patience else None
        with self._changed:
            if self._told:
                return None
            if self._error is not None:
                self._told = True
                return self._error
            return left if self._running else None

    def _work(self) -> None:
        while True:
            with self._changed:
                last, self._under_way, self._next = self._under_way, self._next, None
                if self._under_way is None:
                    if last is not None:
                        self._store.chunks.unpin(self._pin(last))
                    self._running = False
                    self._changed.notify_all()
                    return
                manifest = self._under_way
            error: StoreError | None = None
            try:
                self._mirror.push(manifest, self._store.chunks, self._keep)
            except StoreError as failure:
                error = failure
            with self._changed:
                self._error = error
                self._told = self._told and error is not None

    def _pin(self, manifest: Manifest) -> str:
        return f"copying-{manifest.name}"
