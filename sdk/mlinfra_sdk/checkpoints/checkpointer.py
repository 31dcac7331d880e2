"""``mlinfra_sdk.checkpoint``: save a training run while it goes on, and go on where it was.

>>> ckpt = mlinfra_sdk.checkpoint("resnet")
>>> state = dict(model=model, optimizer=optimizer, rng="all", losses=losses)
>>> for epoch in ckpt.loop(range(90), state=state, every="60s"):
...     for images, labels in ckpt.loop(loader):
...         ...
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from mlinfra_sdk import units
from mlinfra_sdk.checkpoints import announce, notice, random_state
from mlinfra_sdk.checkpoints.copier import Copier
from mlinfra_sdk.checkpoints.keep import Keep
from mlinfra_sdk.checkpoints.manifest import Manifest, check_name
from mlinfra_sdk.checkpoints.mirror import Mirror
from mlinfra_sdk.checkpoints.positions import Frame, Resumption
from mlinfra_sdk.checkpoints.snapshot import Arena, Captured, capture, load
from mlinfra_sdk.checkpoints.store import CheckpointStore
from mlinfra_sdk.checkpoints.values import RNG, captured, put_back, restored
from mlinfra_sdk.errors import RequestError, StoreError

T = TypeVar("T")
State = Mapping[str, Any]

DEFAULT_EVERY = "60s"
_NICE = 10
"""Writing must not slow training down: the thread that does it gets less of the processor."""
_LAST_COPY_S = 600.0
"""How long the end of a loop waits for the last checkpoint to be in the object store."""
_CUT_COPY_S = 60.0
"""The same where a loop is cut off, or its machine is about to end."""


class Checkpointer:
    """Saves and restores one training run by its name; made by :func:`checkpoint`."""

    def __init__(
        self,
        name: str,
        *,
        keep: Keep | None = None,
        to: str = "",
        resume: bool = True,
        store: CheckpointStore | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = check_name(name)
        self.keep = keep or Keep()
        self.store = store or CheckpointStore.default()
        self._copier: Copier | None = None
        if to:
            mirror = Mirror(to, name, dict(storage_options or {}))
            self._copier = Copier(mirror, self.store, self.keep)
        self._resume = resume
        self._state: State = {}
        self._metrics: dict[str, float] = {}
        self._frames: list[Frame] = []
        self._seconds = 0.0
        self._saved_at = time.monotonic()
        self._resumption: Resumption | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[Manifest] | None = None
        self._failed: Exception | None = None
        self._arena = Arena()
        self._noticed = ""
        self.held = 0.0
        """Seconds for which the last save held the loop."""

    # -- saving ------------------------------------------------------------------------------

    def save(
        self,
        state: State | None = None,
        *,
        step: int | None = None,
        wait: bool = False,
        **metrics: float,
    ) -> None:
        """Save now: ``state`` or that of the loop. Returns when a copy has been made; with
        ``wait`` when it is safe, in the object store as well (for which it waits ten minutes at
        most). A save that is under way is waited for first.

        Raises :class:`CheckpointError` for what cannot be saved, and, with ``wait``,
        :class:`StoreError` if the disk or the object store cannot take it.
        """
        self._settle()
        self._metrics.update(metrics)
        done = step if step is not None else self._frames[0].done if self._frames else 0
        self._begin(self._state if state is None else state, done, finished=False)
        if wait:
            self.wait()

    def report(self, **metrics: float) -> None:
        """Measures of the next checkpoint, for ``Keep(best=...)``."""
        self._metrics.update({name: float(value) for name, value in metrics.items()})

    def wait(self) -> None:
        """Until what was saved is safe. Raises what kept it from that."""
        self._settle()
        failed, self._failed = self._failed, None
        if failed is None and self._copier is not None:
            failed = self._copier.wait(_LAST_COPY_S)
        if failed is not None:
            raise failed

    def _settle(self) -> None:
        """The writer has nothing to do any more."""
        if self._writing is not None:
            writing = self._writing
            with suppress(Exception):
                writing.result()
            self._writing = None

    def _begin(self, state: State, step: int, *, finished: bool) -> None:
        """Copy, and have the copy written beside the loop."""
        began = time.perf_counter()
        if not state:
            raise RequestError(
                f"There is nothing to save as {self.name}.",
                hint="Give a state: ckpt.loop(..., state=dict(model=model)), or ckpt.save(dict()).",
            )
        values = {key: captured(key, value) for key, value in state.items()}
        copy = capture(values, self._arena)
        manifest = Manifest(
            self.name,
            0,
            secrets.token_hex(8),
            time.time(),
            step,
            finished,
            dict(self._metrics),
            positions=[frame.position for frame in self._frames],
        )
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "mlinfra-checkpoint", _lower_priority)
        self._writing = self._writer.submit(self._write, manifest, copy)
        self._saved_at = time.monotonic()
        self.held = time.perf_counter() - began

    def _write(self, manifest: Manifest, copy: dict[str, Captured]) -> Manifest:
        """In the writer's thread."""
        import msgspec

        try:
            for it in copy.values():
                it.bring()
            parts = {name: it.store(self.store.chunks) for name, it in copy.items()}
            manifest = msgspec.structs.replace(manifest, parts=parts)
            manifest = self.store.commit(manifest, self.keep)
            announce.saved(manifest, self.keep)
            if self._copier is not None:
                self._copier.offer(manifest)
        except Exception as error:
            self._failed = error
            raise
        return manifest

    # -- restoring ---------------------------------------------------------------------------

    def checkpoints(self) -> list[Manifest]:
        """What there is, oldest first."""
        return self.store.history(self.name)

    def restore(self, state: State, *, number: int | None = None) -> Manifest | None:
        """Put the newest usable checkpoint, or the one of this number, into ``state``: objects are
        changed in place, other values are replaced in the mapping. None if there is none."""
        manifest = self._find() if number is None else self.store.get(self.name, number)
        if manifest is not None:
            self._put(manifest, state)
        return manifest

    def _find(self, *, in_loop: bool = False) -> Manifest | None:
        announce.wanted(self.store, self.name)
        if self._copier is not None:
            try:
                self._copier.pull()
            except StoreError as error:
                if not in_loop:
                    raise
                _warn(f"{error} Training goes on with the checkpoints that are here.")
        return self.store.latest(self.name)

    def _put(self, manifest: Manifest, state: State) -> None:
        absent = [key for key in state if key not in manifest.parts]
        if absent:
            warnings.warn(
                f"Checkpoint {manifest} has no {', '.join(absent)}: left as they are.",
                RuntimeWarning,
                stacklevel=4,
            )
        saved = {
            key: load(manifest.parts[key], self.store.chunks)
            for key in state
            if key in manifest.parts
        }
        for key, value in sorted(saved.items(), key=lambda it: it[0] == RNG):  # the last to be set
            put_back(key, restored(key, manifest.parts[key].kind, value, state[key]), state)

    # -- loops -------------------------------------------------------------------------------

    def loop(
        self,
        items: Iterable[T],
        state: State | None = None,
        every: str | int | None = None,
    ) -> Iterator[T]:
        """The items, with a checkpoint now and then after one; if an earlier loop was cut off, only
        those that it had not done, with the state as it was then.

        ``every`` is a duration (default ``60s``) or a number of items. Loops may be nested: those
        inside go on in the middle, a ``DataLoader`` with the batches that were left. The state is
        given to the outermost one. At its end a last checkpoint is made.
        """
        seconds, steps = _parse_every(every)
        depth = len(self._frames)
        if depth == 0:
            if not state:
                raise RequestError(
                    f"The loop of {self.name} has no state.",
                    hint="Name what is to be saved: ckpt.loop(..., state=dict(model=model)).",
                )
            self._state = state
            self._seconds = seconds or (0.0 if steps else units.parse_duration(DEFAULT_EVERY))
            self._start()
        elif state is not None:
            raise RequestError(
                "An inner loop of checkpoints has no state of its own.",
                hint="Give all of it to the outermost loop.",
            )
        parent = self._frames[-1] if self._frames else None
        frame = Frame(items, parent.begin_inner() if parent else 0, steps)
        yield from self._iterate(frame, depth)

    def _iterate(self, frame: Frame, depth: int) -> Iterator[Any]:
        resumption = self._resumption
        place = resumption.at(depth, frame.ordinal) if resumption is not None else None
        if place is not None and place.skipped:
            return
        source = frame.iterator(place.position if place is not None else None)
        self._frames.append(frame)
        finished = False
        try:
            if resumption is not None and place is not None and place.innermost:
                self._resumption = None
                if resumption.rng is not None:
                    random_state.put(resumption.rng)
            for item in source:
                yield item
                if depth == 0:
                    self._resumption = None  # its body has begun none of the loops to be resumed
                frame.advance()
                self._boundary(frame)
            if depth == 0:
                self._finish(frame)
                finished = True
        finally:
            del self._frames[depth:]
            if depth == 0:
                self._settle()
                if not finished:
                    self._warn_of_copies(_CUT_COPY_S)

    def _start(self) -> None:
        self._resumption = None
        self._saved_at = time.monotonic()
        if not self._resume:
            return
        manifest = self._find(in_loop=True)
        if manifest is None or not manifest.positions:
            return
        if manifest.finished and not announce.again():
            _say(f"Checkpoint {manifest} is of a finished run: starting anew.")
            return
        self._put(manifest, self._state)
        rng = random_state.get() if self._state.get(RNG) == "all" else None
        self._resumption = Resumption(manifest.positions, rng)
        self._metrics = dict(manifest.metrics)
        age = units.format_duration(time.time() - manifest.created)
        _say(f"Going on from checkpoint {manifest}, saved {age} ago.")

    def _boundary(self, frame: Frame) -> None:
        """An item is done: save if it is time, and if the one before has been written."""
        warned = notice.pending()
        urgent = bool(warned) and warned != self._noticed
        due = bool(frame.every) and frame.done % frame.every == 0
        if self._seconds and time.monotonic() - self._saved_at >= self._seconds:
            due = True
        if self._failed is not None:
            failed, self._failed = self._failed, None
            warnings.warn(
                f"The checkpoint {self.name} was not saved: {failed} Training goes on.",
                RuntimeWarning,
                stacklevel=4,
            )
        self._warn_of_copies()
        if urgent:
            self._settle()
        elif not due or (
            self._writing is not None and not self._writing.done() and not frame.every
        ):
            return
        self._settle()
        self._begin(self._state, self._frames[0].done, finished=False)
        if urgent:
            self._noticed = warned
            self._settle()
            self._warn_of_copies(_CUT_COPY_S)
            _say(f"{warned} A checkpoint has been saved at step {self._frames[0].done}.")

    def _finish(self, frame: Frame) -> None:
        self._settle()
        self._begin(self._state, frame.done, finished=True)
        self._settle()
        failed, self._failed = self._failed, None
        if failed is not None:
            if not isinstance(failed, StoreError | OSError):
                raise failed
            _warn(f"{failed}")  # what was trained is not thrown away for it
        self._warn_of_copies(_LAST_COPY_S)

    def _warn_of_copies(self, patience: float = 0.0) -> None:
        """Say once that copying does not work, or what is not copied after so many seconds."""
        error = self._copier.news(patience) if self._copier is not None else None
        if error is not None:
            _warn(f"{error} Checkpoints are safe here; with each next one it is tried again.")


def checkpoint(
    name: str,
    *,
    keep: Keep | None = None,
    to: str = "",
    resume: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> Checkpointer:
    """Checkpoints of this name: where they go, which stay, and whether loops go on from them.

    ``to`` is a URL (``s3://``, ``gs://``, ``az://``) to which each is copied as well, and where
    they are looked for; ``storage_options`` are fsspec's for it.
    """
    return Checkpointer(name, keep=keep, to=to, resume=resume, storage_options=storage_options)


def _parse_every(every: str | int | None) -> tuple[float, int]:
    """Seconds and items; 0 for what was not given."""
    if every is None:
        return 0.0, 0
    if isinstance(every, int) and not isinstance(every, bool) and every > 0:
        return 0.0, every
    with suppress(ValueError):
        if isinstance(every, str) and units.parse_duration(every) > 0:
            return units.parse_duration(every), 0
    raise RequestError(
        f"every={every!r} of a checkpoint is not understood.",
        hint="Write a duration such as every='60s', or a number of steps such as every=100.",
    )


def _lower_priority() -> None:
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=5)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
