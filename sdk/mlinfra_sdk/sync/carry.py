"""Carries out a plan: content goes there and comes here, batch by batch."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from typing import NamedTuple

from mlinfra_sdk.errors import ChunkCorrupt, ChunkMissing

from . import names
from .entries import ABSENT, FILE, FOLDER, ZEROS, Entry
from .knowledge import Knowledge, Moving
from .merge import Plan
from .messages import (
    CHANGED,
    Applied,
    Apply,
    Change,
    Expect,
    Stage,
    Staged,
    Want,
)
from .placing import Placer, expect, ordered
from .reports import Report
from .staging import Stager

_BATCH_BYTES = 16 << 20
_BATCH_FILES = 1000
_UNDER_WAY = 3
"""Batches that are on their way to the machine at once: one fills the round trips of another."""

_WRITTEN = "it is being written; it follows when it is at rest"

Progress = Callable[[int, int], None]
"""Takes the bytes that are done, and those in all."""


class _Upload(NamedTuple):
    """Content that is on its way to the machine, and what can be done there with it."""

    batch: list[Change]
    move: Moving


class Carrier(Knowledge):
    """Moves what was decided on."""

    # -- doing -------------------------------------------------------------------------------

    def _carry_out(self, plan: Plan, report: Report, progress: Progress) -> bool:
        """Do all of it; False if something was found in another state than expected and all has
        to be decided anew."""
        self._left_over = False
        if plan.empty:
            return True
        here = {path: self._tree.known[path].entry for path in plan.up}
        pieces = {piece for entry in self._entries.values() for piece in entry.chunks}
        self._done = 0
        self._total = sum(bytes_to_send(entry, pieces) for entry in here.values())
        self._total += sum(self._entries[path].size for path in plan.down)

        def advance(size: int) -> None:
            self._done += size
            progress(min(self._done, self._total), self._total)

        fine = self._put_aside(plan.aside, report)
        fine = self._send(plan, here, pieces, report, advance) and fine
        fine = self._receive(plan, report, advance) and fine
        return fine and not plan.aside

    def _put_aside(self, paths: list[bytes], report: Report) -> bool:
        when = time.strftime("%Y-%m-%d %H.%M.%S")
        changes = [
            Change(path, self._entries[path].state, to=self._name_aside(path, when))
            for path in paths
        ]
        problems = [""] * len(changes)
        if changes:
            problems = self._peer.ask(Apply(self.name, changes), Applied).problems
        for change, problem in zip(changes, problems, strict=True):
            if not problem:
                report.warnings.append(
                    f"{names.shown(change.path)} was changed on both sides: yours keeps its name,"
                    f" the machine's is {names.shown(change.to)!r}."
                )
        return self._judge(changes, problems, report)

    def _name_aside(self, path: bytes, when: str) -> bytes:
        """A name that is free on both sides: there may be two conflicts within a second."""
        taken = self._tree.known.keys() | self._entries.keys()
        taken |= self._tree.skipped.keys() | self._skipped.keys()
        numbered = itertools.chain([when], (f"{when} {number}" for number in itertools.count(2)))
        found = (names.conflict_name(path, self._machine_name, it) for it in numbered)
        return next(name for name in found if name not in taken)

    def _noted(self, applied: Applied) -> list[str]:
        """Our own changes need not be listed to us."""
        if applied.before == self._change and not any(applied.problems):
            self._change = applied.after
        else:
            self.stale = True
        return applied.problems

    def _judge(self, changes: list[Change], problems: list[str], report: Report) -> bool:
        """Whether nothing has to be decided anew; what could not be done is said."""
        fine = True
        for change, problem in zip(changes, problems, strict=True):
            self._left_over |= bool(problem)
            if problem == CHANGED:
                fine = False
            elif problem and self._failing.get(change.path) != problem:
                self._failing[change.path] = problem
                report.warnings.append(f"{names.shown(change.path)} could not follow: {problem}.")
        return fine

    def _send(
        self,
        plan: Plan,
        here: dict[bytes, Entry],
        pieces: set[bytes],
        report: Report,
        advance: Callable[[int], None],
    ) -> bool:
        changes = [Change(path, self._state_there(path), here[path]) for path in plan.up]
        changes += [Change(path, self._state_there(path)) for path in plan.remove_there]
        fine = True
        under_way: deque[_Upload] = deque()
        put: tuple[list[Change], Future[Applied]] | None = None

        def settle() -> bool:
            """The oldest upload ends, and what came before it is in place."""
            nonlocal put
            batch = self._uploaded(under_way.popleft(), report, advance)
            good = self._put_there(put, report)
            put = batch, self._peer.begin(Apply(self.name, batch), Applied)
            return good

        try:
            for batch in _batches(ordered(changes)):
                upload, good = self._upload(batch, pieces, report)
                under_way.append(upload)
                fine = good and fine
                if len(under_way) == _UNDER_WAY:
                    fine = settle() and fine
            while under_way:
                fine = settle() and fine
            return self._put_there(put, report) and fine
        finally:
            for upload in under_way:
                upload.move.cancel()

    def _put_there(self, put: tuple[list[Change], Future[Applied]] | None, report: Report) -> bool:
        """Wait until a batch is in place on the machine."""
        if put is None:
            return True
        batch, answer = put
        problems = self._noted(answer.result())
        for change, problem in zip(batch, problems, strict=True):
            if not problem:
                self._came_there(change, report)
        return self._judge(batch, problems, report)

    def _upload(
        self, batch: list[Change], pieces: set[bytes], report: Report
    ) -> tuple[_Upload, bool]:
        """Begin to bring the machine the content of a batch; False if something of it cannot be
        had. ``pieces`` are those that the machine has."""
        files = [it for it in batch if it.entry is not None and it.entry.kind == FILE]
        wants = []
        for change in files:
            entry = change.entry
            assert entry is not None
            wants.append(Want(entry.path, entry.state, _lacking(entry, pieces)))
        # A large file of which nothing is lacking need not be staged.
        needed = [
            number
            for number, change in enumerate(files)
            if wants[number].pieces or (change.entry is not None and not change.entry.chunks)
        ]
        stager = Stager(self._tree)
        places, digests = stager.stage([wants[number] for number in needed])
        problems = [""] * len(files)
        for number, place in zip(needed, places, strict=True):
            files[number].place = place
            problems[number] = place.error
        good = self._judge(files, problems, report)
        large = [
            change.entry
            for change, want, problem in zip(files, wants, problems, strict=True)
            if change.entry is not None and want.pieces and not problem
        ]
        expected = Expect(self.name, large, digests) if large else None
        failed = {change.path for change, problem in zip(files, problems, strict=True) if problem}
        pieces.update(*(entry.chunks for entry in large))  # later batches find them in these files
        ready = [it for it in batch if it.path not in failed]
        return _Upload(ready, self._peer.upload(digests, stager, expected)), good

    def _uploaded(
        self, upload: _Upload, report: Report, advance: Callable[[int], None]
    ) -> list[Change]:
        """Wait until an upload is over; gives what of its batch can be put in place."""
        told = 0

        def progress(done: int, total: int) -> None:
            nonlocal told
            advance(done - told)
            told = done

        try:
            upload.move.wait(progress)
        except (ChunkMissing, ChunkCorrupt) as error:  # it is sent with the next sync
            report.warnings.append(error.message)
            self._left_over = True
            return [it for it in upload.batch if it.entry is None or not it.entry.chunks]
        self._done += upload.move.total - told  # also if it was over before anybody waited for it
        return upload.batch

    def _came_there(self, change: Change, report: Report) -> None:
        self._failing.pop(change.path, None)
        if change.entry is None:
            self._entries.pop(change.path, None)
            self._common(change.path, ABSENT)
            report.removed_there += 1
        else:
            self._entries[change.path] = change.entry
            self._common(change.path, change.entry.state)
            report.sent += change.entry.kind != FOLDER

    def _receive(self, plan: Plan, report: Report, advance: Callable[[int], None]) -> bool:
        changes = [Change(path, self._state_here(path), self._entries[path]) for path in plan.down]
        changes += [Change(path, self._state_here(path)) for path in plan.remove_here]
        placer = Placer(self._tree, self._store, durable=True)
        fine = True
        for batch in _batches(ordered(changes)):
            with ExitStack() as parts:
                problems = self._download(batch, advance, parts)
                ready = [it for it, problem in zip(batch, problems, strict=True) if not problem]
                done = iter(placer.apply(ready))
            problems = [problem or next(done) for problem in problems]
            for change, problem in zip(batch, problems, strict=True):
                if not problem:
                    self._came_here(change, report)
            fine = self._judge(batch, problems, report) and fine
        return fine

    def _download(
        self, batch: list[Change], advance: Callable[[int], None], parts: ExitStack
    ) -> list[str]:
        """Bring the content of a batch into the store, of large files into parts that are closed
        with ``parts``; gives for each change what is wrong."""
        own = {piece for known in self._tree.known.values() for piece in known.entry.chunks}
        own |= {ZEROS}
        wants, numbers = [], []
        for number, change in enumerate(batch):
            entry = change.entry
            if entry is None or entry.kind != FILE:
                continue
            lacking = _lacking(entry, own)
            if entry.chunks:
                for digest in expect(self._store, [entry] if lacking else []):
                    parts.callback(self._store.parts.close, digest)
                missing = set(self._store.missing(entry.chunks[index] for index in lacking))
                lacking = [index for index in lacking if entry.chunks[index] in missing]
                advance(entry.size - len(lacking) * (1 << 20))
            if lacking or not entry.chunks:
                wants.append(Want(entry.path, entry.state, lacking))
                numbers.append(number)
        problems = [""] * len(batch)
        if not wants:
            return problems
        staged = self._peer.ask(Stage(self.name, wants), Staged)
        for number, place in zip(numbers, staged.places, strict=True):
            batch[number].place = place
            problems[number] = place.error
        told = 0

        def progress(done: int, total: int) -> None:
            nonlocal told
            advance(done - told)
            told = done

        try:
            self._peer.download(staged.digests, progress)
        except (ChunkMissing, ChunkCorrupt):  # of what was written to meanwhile; the rest is here
            for number, want in zip(numbers, wants, strict=True):
                change = batch[number]
                assert change.entry is not None
                needed = [change.entry.chunks[index] for index in want.pieces]
                if self._store.missing(needed or [change.place.pack]):
                    problems[number] = problems[number] or _WRITTEN
        return problems

    def _came_here(self, change: Change, report: Report) -> None:
        self._failing.pop(change.path, None)
        if change.entry is None:
            self._common(change.path, ABSENT)
            report.removed.append(names.shown(change.path))
        else:
            self._common(change.path, change.entry.state)
            if change.entry.kind != FOLDER:
                report.received.append(names.shown(change.path))

    def _state_here(self, path: bytes) -> bytes:
        known = self._tree.known.get(path)
        return known.entry.state if known is not None else ABSENT

    def _state_there(self, path: bytes) -> bytes:
        entry = self._entries.get(path)
        return entry.state if entry is not None else ABSENT


def _lacking(entry: Entry, pieces: Collection[bytes]) -> list[int]:
    """Which pieces of a large file are not among these, each once."""
    found: dict[bytes, int] = {}
    for index, piece in enumerate(entry.chunks):
        if piece not in pieces and piece != ZEROS:
            found.setdefault(piece, index)
    return list(found.values())


def bytes_to_send(entry: Entry, pieces: Collection[bytes]) -> int:
    return len(_lacking(entry, pieces)) << 20 if entry.chunks else entry.size


def _batches(changes: list[Change]) -> Iterator[list[Change]]:
    """In their order, so that memory and the loss by an interrupt stay small."""
    batch: list[Change] = []
    size = 0
    for change in changes:
        length = change.entry.size if change.entry is not None else 0
        if batch and (size + length > _BATCH_BYTES or len(batch) >= _BATCH_FILES):
            yield batch
            batch, size = [], 0
        batch.append(change)
        size += length
    if batch:
        yield batch
