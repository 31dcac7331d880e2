"""Checkpoints in a directory: ``NAME/00000012.ckpt`` beside a chunk store.

A checkpoint appears by one rename after all its chunks have been synced to disk. It is used only
if its manifest is whole and every chunk is there and right; else the one before is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from mlinfra_sdk import paths
from mlinfra_sdk.checkpoints.keep import Keep
from mlinfra_sdk.checkpoints.manifest import Manifest, check_name, decode, encode
from mlinfra_sdk.errors import CheckpointError, RequestError, StoreError
from mlinfra_sdk.objects.store import ChunkStore

FOLDER_VARIABLE = "MLINFRA_CHECKPOINTS"
"""Set in kernels on a machine with files of its own: where checkpoints lie there."""
STORE_VARIABLE = "MLINFRA_STORE"
"""The chunk store that belongs to it."""

_THREADS = threading.Lock()
"""Of one process; locks of files do not keep its threads apart."""
_FILE = re.compile(r"(\d{8,})\.ckpt")

Warn = Callable[[str], None]


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)


class CheckpointStore:
    """Checkpoints below ``root``, with their content in ``chunks``. Several processes may use it
    at the same time."""

    def __init__(self, root: Path, chunks: ChunkStore) -> None:
        self.root = root
        self.chunks = chunks

    @classmethod
    def default(cls) -> CheckpointStore:
        """The machine's, in a kernel there; else this user's."""
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder:
            return cls(Path(folder), ChunkStore(Path(os.environ[STORE_VARIABLE])))
        return cls(paths.data_dir() / "checkpoints", ChunkStore(paths.data_dir() / "store"))

    def names(self) -> list[str]:
        """What there are checkpoints of."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(it.name for it in self.root.iterdir() if self._numbers(it.name))
        return []

    def history(self, name: str, warn: Warn = _warn) -> list[Manifest]:
        """All whole manifests of a name, oldest first. ``warn`` is told of others."""
        found = []
        for number in self._numbers(check_name(name)):
            with contextlib.suppress(FileNotFoundError):  # pruned just now
                try:
                    found.append(decode(self._path(name, number).read_bytes()))
                except (CheckpointError, OSError) as error:
                    if isinstance(error, FileNotFoundError):
                        raise
                    warn(f"Checkpoint {name} #{number} is left out: {error}")
        return found

    def latest(self, name: str, warn: Warn = _warn) -> Manifest | None:
        """The newest one that is complete; ``warn`` is told of those that are not."""
        for manifest in reversed(self.history(name, warn)):
            missing = self.chunks.missing(manifest.chunks())
            if not missing:
                return manifest
            warn(
                f"Checkpoint {manifest} is left out: {len(missing)} of its "
                f"{len(manifest.chunks())} chunks are missing or damaged."
            )
        return None

    def get(self, name: str, number: int) -> Manifest:
        """This one. Raises :class:`RequestError` if it is not there, and
        :class:`CheckpointError` if it is damaged."""
        try:
            manifest = decode(self._path(check_name(name), number).read_bytes())
        except FileNotFoundError:
            known = ", ".join(map(str, self._numbers(name))) or "none"
            raise RequestError(
                f"There is no checkpoint #{number} of {name}.", hint=f"There are: {known}."
            ) from None
        if self.chunks.missing(manifest.chunks()):
            raise CheckpointError(f"Chunks of checkpoint {manifest} are missing or damaged.")
        return manifest

    def commit(self, manifest: Manifest, keep: Keep | None = None) -> Manifest:
        """Make a checkpoint of a manifest whose chunks have been put into the store. Its number is
        the next one unless it has one that is free; gives it as it was written.

        Raises :class:`StoreError` if the disk cannot take it.
        """
        name = check_name(manifest.name)
        folder = self.root / name
        before = self.history(name, lambda text: None)
        known = set().union(*(it.chunks() for it in before[-2:]))
        self.chunks.secure(digest for digest in manifest.chunks() if digest not in known)
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            with self._locked(name):
                taken = self._numbers(name)
                if manifest.id in (it.id for it in self.history(name, lambda text: None)):
                    return manifest
                if not manifest.number or manifest.number in taken:
                    number = max(taken, default=0) + 1
                    manifest = msgspec.structs.replace(manifest, number=number)
                # Pinned first: from here on nothing of it is removed, whatever happens.
                pin = _pin(name, manifest.number)
                self.chunks.pin(pin, manifest.chunks(), folder)
                self._write(self._path(name, manifest.number), encode(manifest))
                if keep is not None:
                    self._prune(name, keep)
        except OSError as error:
            raise StoreError(
                f"The checkpoint {name} cannot be written below {self.root}: {error.strerror}.",
                hint="Free some disk space, or keep fewer: keep=Keep(last=1).",
            ) from error
        return manifest

    def prune(self, name: str, keep: Keep) -> list[Manifest]:
        """Remove what no rule wants, and what is damaged; gives it."""
        with self._locked(check_name(name)):
            return self._prune(name, keep)

    def _prune(self, name: str, keep: Keep) -> list[Manifest]:
        whole = self.history(name, lambda text: None)
        doomed = keep.doomed(whole)
        kept = {it.number for it in whole} - {it.number for it in doomed}
        for number in self._numbers(name):
            if number not in kept:
                self._remove(name, number)
        pins = set(self.chunks.pins(_pin(name, None)))
        for pin in pins:  # of who was killed before its manifest was written
            text = pin.removeprefix(_pin(name, None))
            if text.isdigit() and int(text) not in kept:
                self.chunks.unpin(pin)
        for manifest in whole:  # pins are not synced to disk
            pin = _pin(name, manifest.number)
            if manifest.number in kept and pin not in pins:
                self.chunks.pin(pin, manifest.chunks(), self.root / name)
        return doomed

    def remove(self, name: str, number: int | None = None) -> None:
        """Remove one checkpoint, or all of a name."""
        if number is not None:
            self.get(name, number)
            with self._locked(name):
                self._remove(name, number)
            return
        for known in self._numbers(check_name(name)):
            self._remove(name, known)
        shutil.rmtree(self.root / name, ignore_errors=True)

    def _remove(self, name: str, number: int) -> None:
        self._path(name, number).unlink(missing_ok=True)
        self.chunks.unpin(_pin(name, number))

    def sizes(self, name: str) -> list[tuple[Manifest, int, int]]:
        """Each checkpoint with the bytes of its whole content, and of what the ones before do not
        have: those it really takes."""
        seen: set[bytes] = set()
        rows = []
        for manifest in self.history(name):
            chunks = manifest.chunks()
            small = sum(len(blob.inline or b"") for blob in manifest.blobs())
            added = sum(size for digest, size in chunks.items() if digest not in seen)
            seen.update(chunks)
            rows.append((manifest, manifest.size, added + small))
        return rows

    def _numbers(self, name: str) -> list[int]:
        try:
            found = os.listdir(self.root / name)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(match[1]) for match in map(_FILE.fullmatch, found) if match)

    def _path(self, name: str, number: int) -> Path:
        return self.root / name / f"{number:08d}.ckpt"

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process at a time chooses numbers and removes. Unlike one of ``flock``, this lock is
        not inherited: processes are forked (by data loaders) while another thread holds it."""
        with _THREADS, contextlib.ExitStack() as stack:
            if (self.root / name).is_dir():
                lock = stack.enter_context(open(self.root / name / ".lock", "w"))
                fcntl.lockf(lock, fcntl.LOCK_EX)
            yield

    def _write(self, path: Path, data: bytes) -> None:
        """Whole or not at all, and on disk when this returns."""
        temporary = path.parent / f".{secrets.token_hex(8)}"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(fd)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _pin(name: str, number: int | None) -> str:
    return f"checkpoint-{name}-{'' if number is None else number}"
