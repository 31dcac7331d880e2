"""The datasets that a machine keeps, for all machines of the same user on the same host.

``ROOT/KEY/VERSION`` is one version of one dataset: read-only files, complete. The key is that of
its location, the version that of its listing, so what has changed upstream is another version, in
which unchanged files are hard links to those of the one before. While it is fetched it is called
``VERSION.part``, which a later try goes on with. ``VERSION.manifest`` says what must be there,
``VERSION.lock`` is locked by who uses it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path, PurePosixPath

import msgspec
from blake3 import blake3

from mlinfra_sdk.errors import RequestError, StoreError

_LEAST_FREE = 0.1
_ABANDONED_S = 86400.0


class Entry(msgspec.Struct, frozen=True):
    """A file of a dataset: its path below the dataset's folder, its size, and what changes when
    its content does."""

    path: str
    size: int
    mark: str = ""


class Manifest(msgspec.Struct):
    """What a complete version has: times of modification tell what was written to since."""

    files: dict[str, tuple[int, int, str]]
    """Size, time of modification (ns), mark."""


def key_of(location: str) -> str:
    """The name of a dataset's place in the cache."""
    return blake3(location.encode()).hexdigest(16)


def version_of(entries: list[Entry]) -> str:
    """The name of the version with these files."""
    return blake3(msgspec.msgpack.encode(sorted(entries, key=lambda it: it.path))).hexdigest(16)


def check_path(path: str) -> str:
    """A path from elsewhere, once it is sure to stay below its root."""
    parts = PurePosixPath(path).parts
    plain = path == "/".join(parts) and not path.startswith("/") and "\0" not in path
    if not parts or not plain or ".." in parts or "." in parts:
        raise RequestError(f"A dataset must not have a file {path!r}.")
    return path


class Cache:
    """The datasets below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def version(self, key: str, version: str) -> Path:
        return self.root / _plain(key) / _plain(version)

    def has(self, key: str, version: str) -> bool:
        """Whether this version is complete, and nothing has been written to it."""
        folder = self.version(key, version)
        if not folder.is_dir():
            return False
        known = _known(self._beside(folder, "manifest"))
        right = {
            path for path, facts in (known or {}).items() if _facts(folder / path) == facts[:2]
        }
        if known is not None and right == known.keys():
            with suppress(FileNotFoundError):  # evicted in this moment
                os.utime(folder)
                return True
            return False
        part = self.part(key, version)
        if not part.exists():  # what is still right is taken over from there
            _keep(folder, right)
            folder.rename(part)
        return False

    def part(self, key: str, version: str) -> Path:
        """Where a version is put together."""
        return self._beside(self.version(key, version), "part")

    @staticmethod
    def _beside(folder: Path, what: str) -> Path:
        return folder.with_name(f"{folder.name}.{what}")

    def begin(self, key: str, version: str, entries: list[Entry]) -> list[Entry]:
        """Prepare the folder of a version; gives the files that it does not have yet. Those of an
        older version that have the same marks are taken over."""
        part = self.part(key, version)
        part.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.utime(part)  # it is not abandoned
        lacking = [entry for entry in entries if not _is(part / check_path(entry.path), entry.size)]
        marked = {entry.path for entry in lacking if entry.mark}
        older = {(path, size, mark): file for path, size, mark, file in self._others(key, marked)}
        missing = []
        for entry in lacking:
            path = part / entry.path
            found = older.get((entry.path, entry.size, entry.mark))
            if found is not None:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                with suppress(OSError):
                    os.link(found, path)
                    continue
            missing.append(entry)
        return missing

    def older(self, key: str, paths: Set[str]) -> dict[str, Path]:
        """Those of these files that other versions have, of several the newest."""
        return {path: file for path, _, _, file in self._others(key, paths)}

    def _others(self, key: str, paths: Set[str]) -> Iterator[tuple[str, int, str, Path]]:
        """Those of these files that are as they were in other versions, the oldest first."""
        if not paths:
            return
        manifests = (self.root / _plain(key)).glob("*.manifest")
        for manifest in sorted(manifests, key=_modified):
            known = _known(manifest) or {}
            for path in paths & known.keys():
                size, modified, mark = known[path]
                file = manifest.with_suffix("") / path
                if _facts(file) == (size, modified):
                    yield path, size, mark, file

    def finish(self, key: str, version: str, entries: list[Entry]) -> Path:
        """All files are there: make the version complete, in one step. It stays as it is if it is
        complete already, since another client may have been faster."""
        part, folder = self.part(key, version), self.version(key, version)
        if self.has(key, version):
            shutil.rmtree(part, ignore_errors=True)
            return folder
        part.mkdir(mode=0o700, parents=True, exist_ok=True)  # nothing began an empty one
        files = {}
        for entry in entries:
            path = part / entry.path
            if not _is(path, entry.size):
                raise StoreError(f"{entry.path!r} of the dataset is not there in the end.")
            path.chmod(path.stat().st_mode & 0o555)
            files[entry.path] = (entry.size, path.stat().st_mtime_ns, entry.mark)
        _keep(part, files.keys())
        manifest = self._beside(folder, "manifest")
        manifest.write_bytes(msgspec.msgpack.encode(Manifest(files)))
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        return folder

    @contextmanager
    def fetching(self, key: str) -> Iterator[None]:
        """Nobody else, be it in this process or in another one, puts together this dataset
        meanwhile."""
        folder = self.root / _plain(key)
        folder.mkdir(mode=0o700, exist_ok=True)
        with open(folder / "fetch.lock", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def use(self, key: str, version: str) -> int:
        """Keep a version until the returned file descriptor is closed, or this process ends."""
        lock = self._beside(self.version(key, version), "lock")
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        return fd

    def evict(self, needed: int, least_free: float = _LEAST_FREE) -> int:
        """Remove what was left behind, then versions, the least recently used first, until there
        is room for ``needed`` bytes and a share of the disk stays free. Those in use stay. Gives
        the bytes freed, and raises :class:`StoreError` if there still is no room."""
        freed = 0
        for folder in chain(self._abandoned(), self._versions()):
            if self._room(least_free) >= needed:
                break
            freed += self._delete(folder) if folder.suffix else self._remove(folder)
        if self._room(0.0) < needed:
            raise StoreError(
                f"A dataset of {needed} bytes does not fit on the disk of {self.root}.",
                hint="Ask for a machine with a larger disk, or name a smaller part of the data.",
            )
        return freed

    def _room(self, least_free: float) -> float:
        disk = os.statvfs(self.root)
        return (disk.f_bavail - least_free * disk.f_blocks) * disk.f_frsize

    def _abandoned(self) -> Iterator[Path]:
        """What an ended process had begun to remove, or to put together."""
        yield from self.root.glob("*/*.gone")
        for part in self.root.glob("*/*.part"):
            if time.time() - _touched(part) > _ABANDONED_S:
                yield part

    def _versions(self) -> list[Path]:
        """The least recently used first."""
        found = [it for it in self.root.glob("*/*") if it.is_dir() and not it.suffix]
        return sorted(found, key=_modified)

    def _delete(self, folder: Path) -> int:
        before = os.statvfs(self.root).f_bavail
        shutil.rmtree(folder, ignore_errors=True)
        after = os.statvfs(self.root)
        return max(0, (after.f_bavail - before) * after.f_frsize)

    def _remove(self, folder: Path) -> int:
        lock = self._beside(folder, "lock")
        with open(os.open(lock, os.O_RDWR | os.O_CREAT, 0o600), "wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return 0
            away = self._beside(folder, f"{time.time_ns()}.gone")
            with suppress(FileNotFoundError):  # another process may have been faster
                folder.rename(away)
                self._beside(folder, "manifest").unlink(missing_ok=True)
            freed = self._delete(away)
            lock.unlink(missing_ok=True)
            return freed


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # removed by another process in this moment
        return 0.0


def _touched(folder: Path) -> float:
    """When anything in a folder was changed last."""
    newest = 0.0
    for place, _, names in os.walk(folder):
        for path in (place, *(os.path.join(place, name) for name in names)):
            with suppress(FileNotFoundError):  # removed by another process in this moment
                newest = max(newest, os.lstat(path).st_ctime)
    return newest


def _known(manifest: Path) -> dict[str, tuple[int, int, str]] | None:
    """The files that a manifest names; None if it cannot be read."""
    try:
        return msgspec.msgpack.decode(manifest.read_bytes(), type=Manifest).files
    except (OSError, msgspec.DecodeError):
        return None


def _facts(path: Path) -> tuple[int, int] | None:
    """Size and time of modification; None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _keep(folder: Path, paths: Set[str]) -> None:
    """Remove all files but these."""
    wanted = {folder / path for path in paths}
    for path in list(folder.rglob("*")):
        if path.is_file() and path not in wanted:
            path.unlink()


def _is(path: Path, size: int) -> bool:
    try:
        return path.is_file() and path.stat().st_size == size
    except OSError:
        return False


def _plain(name: str) -> str:
    if not name.isalnum():
        raise RequestError(f"{name!r} is not the name of a dataset.")
    return name
