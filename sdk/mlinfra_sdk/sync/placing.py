"""Content that has come: put in place, each file entirely or not at all."""

from __future__ import annotations

import errno
import itertools
import os
import secrets
import stat
import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import msgspec

from mlinfra_sdk.errors import ChunkMissing, StoreError, SyncError
from mlinfra_sdk.objects.parts import copy_range
from mlinfra_sdk.objects.store import ChunkStore

from . import names
from .entries import (
    CHUNK,
    FILE,
    FOLDER,
    LINK,
    ZEROS,
    Entry,
    digest_of,
    digest_of_chunks,
    piece_length,
    read_piece,
)
from .messages import CHANGED, Change, Place
from .tree import Tree, as_known

_THREADS = min(4, os.cpu_count() or 1)
_TOGETHER = 64
"""Fewer small files are not worth threads."""
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def expect(store: ChunkStore, files: Iterable[Entry]) -> list[bytes]:
    """Have the pieces of large files put into parts of the store as they come, until a
    :class:`Placer` takes these; gives the digests of the parts that were opened for it."""
    return [
        entry.digest
        for entry in files
        if entry.chunks
        and digest_of_chunks(entry.chunks) == entry.digest
        and store.parts.open(entry.digest, entry.chunks, entry.size, CHUNK)
    ]


def _is_new(change: Change) -> bool:
    """Whether this is a small file where nothing was."""
    entry = change.entry
    return (
        entry is not None
        and entry.kind == FILE
        and not (entry.chunks or change.old or change.to)
        and entry.path == change.path
    )


def _makes_up(entry: Entry) -> bool:
    """Whether the pieces make up the file's size."""
    return (len(entry.chunks) - 1) * CHUNK < entry.size <= len(entry.chunks) * CHUNK


class _Pack(threading.local):
    """The pack that a thread has read last."""

    digest = b""
    data = b""


class Placer:
    """Makes changes in a tree, taking content from a store and from the tree's own files.

    ``durable``: what is in place has also reached the disk.
    """

    def __init__(self, tree: Tree, store: ChunkStore, *, durable: bool) -> None:
        self._tree = tree
        self._store = store
        self._durable = durable
        self._pack = _Pack()
        self._used: set[bytes] = set()
        """Pieces that were taken from the store."""
        self._own: dict[bytes, tuple[bytes, int]] | None = None
        self._temporary = names.TEMPORARY + secrets.token_hex(8).encode() + b"-"
        self._numbers = itertools.count()

    def apply(
        self, changes: list[Change], progress: Callable[[int], None] = lambda size: None
    ) -> list[str]:
        """Make the changes in this order, each entirely or not at all; gives for each what kept it
        from being made, or nothing. ``progress`` is told the bytes that are in place.

        Raises :class:`SyncError` when the disk is full: what is in place stays in place.
        """
        self._own = None
        with self._tree.root.holding():
            return self._apply(changes, progress)

    def _apply(self, changes: list[Change], progress: Callable[[int], None]) -> list[str]:
        problems = [""] * len(changes)
        try:
            for alike, group in itertools.groupby(enumerate(changes), lambda it: _is_new(it[1])):
                numbered = list(group)
                if alike and len(numbered) >= _TOGETHER:
                    self._make_together(numbered, problems, progress)
                    continue
                for number, change in numbered:
                    try:
                        self._make(change)
                        progress(change.entry.size if change.entry else 0)
                    except (SyncError, StoreError, OSError) as error:
                        problems[number] = self._problem(change, error)
        finally:
            self._clear_store(changes)
        return problems

    def _problem(self, change: Change, error: SyncError | StoreError | OSError) -> str:
        """What kept a change from being made; raised if nothing more can be made."""
        if isinstance(error, SyncError):
            return error.message
        if isinstance(error, StoreError):
            return CHANGED if isinstance(error, ChunkMissing) else str(error)
        if error.errno in _FULL:
            raise SyncError(
                f"The disk of {self._tree.root.path} is full:"
                f" {names.shown(change.path)} could not be written.",
                hint="Free some space; what is missing follows with the next sync.",
            ) from None
        return error.strerror or str(error)

    def _make_together(
        self,
        numbered: list[tuple[int, Change]],
        problems: list[str],
        progress: Callable[[int], None],
    ) -> None:
        """Make new small files by several threads: most of the time they wait for the kernel, or
        for the disk."""
        ready = []
        for number, change in numbered:
            try:
                if self._tree.now(change.path) != change.old:
                    raise SyncError(CHANGED)
                ready.append((number, change))
            except (SyncError, OSError) as error:
                problems[number] = self._problem(change, error)
        size = max(1, -(-len(ready) // _THREADS))
        shares = [ready[start : start + size] for start in range(0, len(ready), size)]
        failed = []
        with ThreadPoolExecutor(_THREADS) as pool:
            for share, outcomes in zip(shares, pool.map(self._write_share, shares), strict=True):
                for (number, change), outcome in zip(share, outcomes, strict=True):
                    assert change.entry is not None
                    if isinstance(outcome, os.stat_result):
                        self._note(change.entry, outcome)
                        progress(change.entry.size)
                    else:
                        failed.append((number, change, outcome))
        for number, change, fault in failed:
            problems[number] = self._problem(change, fault)

    def _write_share(
        self, share: list[tuple[int, Change]]
    ) -> list[os.stat_result | SyncError | StoreError | OSError]:
        """Put files in place; for each its status, or why it could not be done."""
        outcomes: list[os.stat_result | SyncError | StoreError | OSError] = []
        with self._tree.root.holding():
            for _, change in share:
                try:
                    outcomes.append(self._write(change))
                except (SyncError, StoreError, OSError) as error:
                    outcomes.append(error)
        return outcomes

    def _make(self, change: Change) -> None:
        if self._tree.now(change.path) != change.old:
            raise SyncError(CHANGED)
        root, entry = self._tree.root, change.entry
        if entry is not None and entry.path != change.path:
            raise SyncError("its entry is that of another path")
        if change.to:
            names.parts(change.to)
            root.move(change.path, change.to)
            self._tree.removed(change.path)
            return
        if entry is None:
            root.remove(change.path)
            self._tree.removed(change.path)
            return
        if change.old[:1] == b"d" and entry.kind != FOLDER:
            root.remove(change.path)
            self._tree.removed(change.path)
            change = msgspec.structs.replace(change, old=b"")
        elif change.old and entry.kind == FOLDER:
            root.remove(change.path)
        if entry.kind == FOLDER:
            root.make_directory(change.path)
        elif entry.kind == LINK:
            if not names.link_stays_inside(entry.path, entry.digest):
                raise SyncError(f"it is a link to {names.shown(entry.digest)}, outside")
            try:
                root.make_link(change.path, entry.digest, replace=bool(change.old))
            except FileExistsError:
                raise SyncError(CHANGED) from None
        elif entry.kind == FILE:
            self._note(entry, self._write(change))
            return
        else:
            raise SyncError("it is of no known kind")
        status = root.status(change.path)
        if status is not None:
            self._tree.wrote(entry, status)

    def _note(self, entry: Entry, status: os.stat_result) -> None:
        """A file has been put in place."""
        if (status.st_size, status.st_mtime_ns) == (entry.size, entry.mtime):
            self._tree.wrote(entry, status)  # else the file system has coarser times: it is read
        if self._own is not None:
            for index, chunk in enumerate(entry.chunks):
                self._own[chunk] = entry.path, index * CHUNK

    def _write(self, change: Change) -> os.stat_result:
        """Put a file in place; gives its status."""
        entry = change.entry
        assert entry is not None
        folder, name = self._tree.root.at(change.path, create=True)
        if not entry.chunks:
            return self._write_in(folder, name, change, entry)
        folder = os.dup(folder)  # pieces may come from files in other directories
        try:
            return self._write_in(folder, name, change, entry)
        finally:
            os.close(folder)

    def _write_in(self, folder: int, name: bytes, change: Change, entry: Entry) -> os.stat_result:
        temporary = self._temporary + b"%d" % next(self._numbers)
        mode = 0o777 if entry.executable else 0o666
        fd = os.open(temporary, _NEW, mode, dir_fd=folder)
        part = self._store.parts.take(entry.digest) if entry.chunks else None
        try:
            try:
                if part is None:
                    self._fill(fd, change, entry, ())
                else:
                    self._fill(part.fd, change, entry, part.have)
                    part.move(fd, temporary, folder)
                if change.old[:1] in (b"f", b"x"):
                    os.fchmod(fd, self._mode(folder, name, entry))
                os.utime(fd, ns=(entry.mtime, entry.mtime))
                if self._durable:
                    os.fsync(fd)
                self._give_name(folder, temporary, name, change)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise
            status = os.fstat(fd)
        finally:
            os.close(fd)
            if part is not None:
                part.close()
        if name.endswith(b".py"):
            _forget_bytecode(folder, name)
        return status

    def _give_name(self, folder: int, temporary: bytes, name: bytes, change: Change) -> None:
        """Put what is written in its place, unless something else has come there meanwhile."""
        if not change.old:
            try:
                os.link(
                    temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False
                )
            except FileExistsError:
                raise SyncError(CHANGED) from None
            except OSError as error:  # a file system without hard links?
                if error.errno in _FULL:
                    raise
            else:
                os.unlink(temporary, dir_fd=folder)
                return
        if self._tree.now(change.path) != change.old:
            raise SyncError(CHANGED)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)

    def _fill(self, fd: int, change: Change, entry: Entry, have: Collection[bytes]) -> None:
        """Write the content, but for the pieces that are there."""
        if not entry.chunks:
            data = self._small(change.place, entry)
            while data:
                data = data[os.write(fd, data) :]
            return
        if digest_of_chunks(entry.chunks) != entry.digest:
            raise SyncError("its pieces do not make up its content")
        if not _makes_up(entry):
            raise SyncError("its pieces do not make up its size")
        os.ftruncate(fd, entry.size)
        kept = self._keep(fd, change, entry, have)
        for index, digest in enumerate(entry.chunks):
            if (
                index in kept
                or digest in have
                or (digest == ZEROS and piece_length(entry, index) == CHUNK)
            ):
                continue  # the last case is a hole
            piece = self._piece(digest)
            if len(piece) != piece_length(entry, index):
                raise SyncError("its pieces do not make up its size")
            os.pwrite(fd, piece, index * CHUNK)

    def _keep(self, fd: int, change: Change, entry: Entry, have: Collection[bytes]) -> set[int]:
        """Copy what stays as it is from the file that is replaced, which is in the state that was
        expected. Gives the numbers of these pieces."""
        known = self._tree.known.get(change.path)
        if known is None or known.entry.state != change.old:
            return set()
        old = known.entry
        same = [
            index
            for index, (mine, theirs) in enumerate(zip(old.chunks, entry.chunks, strict=False))
            if mine == theirs != ZEROS and mine not in have
        ]
        kept: set[int] = set()
        with suppress(OSError), self._tree.root.reading(change.path) as source:
            if not as_known(known, os.fstat(source)):
                return set()
            for index in same:
                copy_range(source, fd, index * CHUNK, piece_length(entry, index))
                kept.add(index)
            if not as_known(known, os.fstat(source)):
                raise SyncError(CHANGED)
        return kept

    def _small(self, place: Place, entry: Entry) -> memoryview:
        pack = self._pack
        if place.pack != pack.digest:
            pack.data = self._store.read_chunk(place.pack)
            pack.digest = place.pack
        data = memoryview(pack.data)[place.offset : place.offset + entry.size]
        if len(data) != entry.size or digest_of(data) != entry.digest:
            raise SyncError("its content is not what it should be")
        return data

    def _piece(self, digest: bytes) -> bytes:
        """From a file of this tree, else from the store."""
        if self._own is None:
            self._own = {
                chunk: (known.entry.path, index * CHUNK)
                for known in self._tree.known.values()
                for index, chunk in enumerate(known.entry.chunks)
            }
        at = self._own.get(digest)
        if at is not None:
            with suppress(OSError), self._tree.root.reading(at[0]) as fd:
                data = read_piece(fd, at[1], CHUNK)
                if digest_of(data) == digest:
                    return data
        piece = self._store.read_chunk(digest)
        self._used.add(digest)
        return piece

    def _mode(self, folder: int, name: bytes, entry: Entry) -> int:
        """The permissions of the file that is replaced, and whether it can be executed."""
        mode = stat.S_IMODE(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode) & 0o777
        return (mode & ~0o111) | ((mode & 0o444) >> 2 if entry.executable else 0)

    def _clear_store(self, changes: list[Change]) -> None:
        """What is in place need not lie in the store too."""
        self._pack = _Pack()
        packs = {change.place.pack for change in changes if change.place.pack}
        self._store.discard(packs | self._used)
        self._used.clear()


def ordered(changes: Iterable[Change]) -> list[Change]:
    """In an order in which they can be made: renames, removals below what takes the place of a
    directory, directories, files, and last the other removals, because content may come from a
    file that goes."""
    changes = list(changes)
    taken = {it.path for it in changes if it.entry is not None and it.entry.kind != FOLDER}

    def rank(change: Change) -> tuple[int, int, bytes]:
        depth = change.path.count(b"/")
        if change.to:
            return 0, depth, change.path
        if change.entry is None:
            makes_room = not taken.isdisjoint(names.ancestors(change.path))
            return (1 if makes_room else 4), -depth, change.path
        return (2 if change.entry.kind == FOLDER else 3), depth, change.path

    return sorted(changes, key=rank)


def _forget_bytecode(folder: int, name: bytes) -> None:
    """What Python compiled from the old source: it compares times in seconds, and an edit may come
    within the same one."""
    with suppress(OSError):
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        cache = os.open(b"__pycache__", flags, dir_fd=folder)
        try:
            stem = os.fsdecode(name[:-3]) + "."
            for compiled in os.listdir(cache):
                if compiled.startswith(stem) and compiled.endswith(".pyc"):
                    os.unlink(compiled, dir_fd=cache)
        finally:
            os.close(cache)
