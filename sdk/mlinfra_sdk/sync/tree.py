"""What lies in a directory tree, without reading again what has not changed."""

from __future__ import annotations

import os
import secrets
import stat
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import msgspec

from mlinfra_sdk.errors import SyncError

from . import names
from .entries import FILE, FOLDER, LINK, Entry, read_file
from .ignore import FILES, MARKERS, RuleFile, Rules
from .root import Root, open_file

_VERSION = 1
_DEEPEST = 100
_TRIES = 3
_TICK = 50_000_000
"""Nanoseconds that a file system's clock may lag behind, and 2 s where it has whole seconds."""
_KEPT = 64 << 20
"""Bytes of small files that are kept after they were read, because they are about to be sent."""
_LARGEST_RULES = 1 << 20


class Found(NamedTuple):
    """What the file system says of a path."""

    kind: str
    size: int
    mtime: int
    executable: bool
    inode: int
    ctime: int
    allocated: int


class Known(msgspec.Struct, array_like=True, gc=False):
    """An entry and the file that it was read from. ``racy``: the file may have been written in the
    very tick in which it was read, so its times prove nothing. ``change`` numbers the changes."""

    entry: Entry
    inode: int
    ctime: int
    racy: bool = False
    change: int = 0


class _Cache(msgspec.Struct, array_like=True):
    version: int
    boot: str
    root: str
    known: list[Known]


class Tree:
    """The files below ``root``. What has been read is remembered in the file ``cache``, until the
    system is booted again: files are put in place without being synced to disk."""

    def __init__(
        self, root: Path, cache: Path | None = None, excluded: Collection[bytes] = ()
    ) -> None:
        self.root = Root(root)
        self._excluded = frozenset(excluded)
        self.known: dict[bytes, Known] = {}
        self.rules = Rules()
        self.skipped: dict[bytes, str] = {}
        """Paths that take no part, with the reason (empty: not worth a word)."""
        self.changes = 0
        self.gone: dict[bytes, int] = {}
        """Paths that were removed, and the number of that change."""
        self.fresh: dict[bytes, bytes] = {}
        """Content of small files that were read by the last scan."""
        self._fresh_bytes = 0
        self._cache = cache
        self._saved = 0
        self._rule_times: dict[bytes, tuple[int, int, int]] = {}
        self._load()

    # -- scanning ----------------------------------------------------------------------------

    def exclude(self, path: bytes) -> None:
        """From now on leave this path and what is below it out."""
        self._excluded |= {path}

    def scan(
        self,
        rules: Rules | None = None,
        *,
        lazy_above: int | None = None,
        wanted: Collection[bytes] = (),
        before_reading: Callable[[list[tuple[bytes, int]]], None] | None = None,
        most: int | None = None,
    ) -> None:
        """Find out what has changed.

        With ``rules`` those count, else the ones in the tree. New files above ``lazy_above`` bytes
        are read only if their path is ``wanted``. ``before_reading`` is told paths and bytes of
        what has to be read. Raises :class:`SyncError` where there are more than ``most`` files.
        """
        self.skipped = {}
        self.fresh.clear()
        self._fresh_bytes = 0
        walk = _Walk(self.known, self.skipped, most, self._own_rules if rules is None else None)
        walk.rules = self.rules if rules is None else rules
        walk.excluded = self._excluded
        with self.root.opened() as fd:
            walk.folder(fd, b"", 0)
        found = walk.found
        if rules is None:
            for path in self.rules.files.keys() - found.keys() - walk.unchanged:
                self.rules.drop(path)
        for path in self.known.keys() - found.keys() - walk.unchanged:
            self._remove(path)
        unread = []
        for path, it in found.items():
            known = self.known.get(path)
            if (
                known is None
                or not _same(known, it)
                or (_unread(known.entry) and it.kind == FILE and path in wanted)
            ):
                unread.append((path, it))
        if before_reading is not None:
            files = [(path, it) for path, it in unread if it.kind == FILE]
            before_reading([(path, min(it.size, it.allocated)) for path, it in files])
        with self.root.holding():
            for path, it in unread:
                lazy = lazy_above is not None and it.size > lazy_above and path not in wanted
                known = self.known.get(path)
                self._read(path, it, lazy and (known is None or _unread(known.entry)))

    def _own_rules(self, folder: int, prefix: bytes, present: Collection[bytes]) -> None:
        """Take notice of the rules in a directory that is about to be walked."""
        for kind in FILES:
            path = prefix + kind
            if kind not in present:
                if path in self.rules.files:
                    self.rules.drop(path)
                continue
            with suppress(OSError):
                fd = open_file(kind, folder)
                try:
                    status = os.fstat(fd)
                    times = status.st_ino, status.st_mtime_ns, status.st_size
                    at_rest = time.time_ns() - status.st_mtime_ns > 2_000_000_000
                    if path in self.rules.files and self._rule_times.get(path) == times and at_rest:
                        continue
                    if stat.S_ISREG(status.st_mode):
                        text = os.read(fd, _LARGEST_RULES)
                        self._rule_times[path] = times
                        old = self.rules.files.get(path)
                        if old is None or old.text != text:
                            self.rules.put(RuleFile(path, text))
                finally:
                    os.close(fd)

    def _read(self, path: bytes, it: Found, lazy: bool) -> None:
        """Read what lies at a path, and remember it."""
        if it.kind == FOLDER:
            self._put(Known(Entry(path, FOLDER), 0, 0))
            return
        try:
            if it.kind == LINK:
                target = self.root.target(path)
                if not names.link_stays_inside(path, target):
                    self._skip(path, f"it is a link to {names.shown(target)}, outside")
                    return
                self._put(Known(Entry(path, LINK, digest=target), it.inode, it.ctime))
            elif lazy:
                entry = Entry(path, FILE, it.size, it.mtime, it.executable)
                self._put(Known(entry, it.inode, it.ctime))
            else:
                self._read_file(path)
        except (FileNotFoundError, NotADirectoryError):
            self._skip(path, "it vanished while it was read")
        except PermissionError:
            self._skip(path, "it cannot be read (permission denied)")
        except OSError as error:
            self._skip(path, f"it cannot be read ({error.strerror})")

    def _read_file(self, path: bytes) -> None:
        for _ in range(_TRIES):
            fd = self.root.open(path)
            try:
                now = time.time_ns()
                before = os.fstat(fd)
                if not stat.S_ISREG(before.st_mode):
                    raise FileNotFoundError
                digest, chunks, data = read_file(fd, before.st_size)
                after = os.fstat(fd)
            finally:
                os.close(fd)
            if _times(before) == _times(after) and (data is None or len(data) == before.st_size):
                break
        else:
            self._skip(path, "it is being written; it follows when it is at rest")
            return
        entry = Entry(
            path,
            FILE,
            before.st_size,
            before.st_mtime_ns,
            bool(before.st_mode & 0o100),
            digest,
            chunks,
        )
        racy = before.st_ctime_ns > now - _tick(before.st_ctime_ns)
        self._put(Known(entry, before.st_ino, before.st_ctime_ns, racy))
        if data is not None and self._fresh_bytes + len(data) <= _KEPT:
            self.fresh[path] = data
            self._fresh_bytes += len(data)

    def _skip(self, path: bytes, reason: str) -> None:
        self.skipped[path] = reason
        self._remove(path)

    # -- the record --------------------------------------------------------------------------

    def _put(self, known: Known) -> None:
        path = known.entry.path
        old = self.known.get(path)
        if old is not None and old.entry == known.entry:
            known.change = old.change
            self.known[path] = known
            self._saved = -1
            return
        self.changes += 1
        known.change = self.changes
        self.gone.pop(path, None)
        self.known[path] = known

    def _remove(self, path: bytes) -> None:
        if self.known.pop(path, None) is not None:
            self.changes += 1
            self.gone[path] = self.changes

    def wrote(self, entry: Entry, status: os.stat_result) -> None:
        """``entry`` has just been put in its place, where it has this status. Whoever writes to it
        sets its time, so that only a time of this very tick proves nothing."""
        if entry.kind == FOLDER:
            self._put(Known(entry, 0, 0))
            return
        racy = status.st_mtime_ns > status.st_ctime_ns - _tick(status.st_ctime_ns)
        self._put(Known(entry, status.st_ino, status.st_ctime_ns, racy))

    def removed(self, path: bytes) -> None:
        """Nothing is at ``path`` any more, nor below it."""
        known = self.known.get(path)
        self._remove(path)
        if known is None or known.entry.kind != FOLDER:
            return
        for below in [it for it in self.known if it.startswith(path + b"/")]:
            self._remove(below)

    def entries(self) -> dict[bytes, Entry]:
        """What lies where."""
        return {path: known.entry for path, known in self.known.items()}

    def since(self, change: int) -> tuple[list[Entry], list[bytes]]:
        """What has come or changed, and what has gone, after the change of this number."""
        return (
            [known.entry for known in self.known.values() if known.change > change],
            [path for path, number in self.gone.items() if number > change],
        )

    def now(self, path: bytes) -> bytes:
        """The state of a path at this moment, which may be newer than the last scan."""
        status = self.root.status(path)
        if status is None:
            self.removed(path)
            return b""
        it = found_of(status)
        if it is None:
            return b"?"  # a device, a socket: equal to nothing
        known = self.known.get(path)
        if known is None or not _same(known, it) or _unread(known.entry):
            self._read(path, it, lazy=False)
            known = self.known.get(path)
        return known.entry.state if known is not None else b"?"

    # -- the cache ---------------------------------------------------------------------------

    def _load(self) -> None:
        if self._cache is None:
            return
        with suppress(OSError, msgspec.MsgspecError):
            cache = msgspec.msgpack.decode(self._cache.read_bytes(), type=_Cache)
            mine = _VERSION, boot_id(), str(self.root.path)
            if (cache.version, cache.boot, cache.root) == mine and cache.boot:
                self.known = {known.entry.path: known for known in cache.known}
                self.changes = max((known.change for known in cache.known), default=0)
                self._saved = self.changes

    def save(self) -> None:
        """Remember for other processes; without that they read everything again."""
        if self._cache is None or self._saved == self.changes:
            return
        cache = _Cache(_VERSION, boot_id(), str(self.root.path), list(self.known.values()))
        with suppress(OSError):
            write_private(self._cache, msgspec.msgpack.encode(cache))
            self._saved = self.changes


class _Walk:
    """One walk through a tree."""

    def __init__(
        self,
        known: Mapping[bytes, Known],
        skipped: dict[bytes, str],
        most: int | None,
        own_rules: Callable[[int, bytes, Collection[bytes]], None] | None,
    ) -> None:
        self.found: dict[bytes, Found] = {}
        self.unchanged: set[bytes] = set()
        """Files that are as they are known to be, and so most of them."""
        self._known = known
        self._skipped = skipped
        self._most = most
        self._own_rules = own_rules
        self.rules = Rules()
        self.excluded: frozenset[bytes] = frozenset()

    def folder(self, fd: int, prefix: bytes, depth: int) -> None:
        with os.scandir(fd) as listing:
            items = {os.fsencode(item.name): item for item in listing}
        if prefix and any(marker in items for marker in MARKERS):
            self._skipped[prefix[:-1]] = ""
            self.found.pop(prefix[:-1], None)
            return
        if self._own_rules is not None:
            self._own_rules(fd, prefix, items.keys())
        ignored, excluded, known, unchanged = (
            self.rules.ignored,
            self.excluded,
            self._known,
            self.unchanged,
        )
        for name, item in items.items():
            if name.startswith(names.TEMPORARY):
                _remove_remains(name, fd)
                continue
            path = prefix + name
            try:
                status = item.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError as error:
                self._skipped[path] = f"it cannot be read ({error.strerror})"
                continue
            old = known.get(path)
            if old is not None and as_known(old, status):
                if ignored(path, False) or path in excluded:
                    self._skipped[path] = ""
                else:
                    unchanged.add(path)
                continue
            it = found_of(status)
            if path in excluded or ignored(path, it is not None and it.kind == FOLDER):
                self._skipped[path] = ""
            elif it is None:
                self._skipped[path] = "it is neither a file nor a directory"
            else:
                self.found[path] = it
                if it.kind == FOLDER:
                    self._enter(fd, name, path, depth)
        if self._most is not None and len(self.found) + len(unchanged) > self._most:
            raise TooMany(self.found, len(unchanged))

    def _enter(self, fd: int, name: bytes, path: bytes, depth: int) -> None:
        if depth >= _DEEPEST:
            self._leave_out(path, f"it lies more than {_DEEPEST} directories deep")
            return
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            inner = os.open(name, flags, dir_fd=fd)
        except OSError as error:
            self._leave_out(path, f"it cannot be read ({error.strerror})")
            return
        try:
            self.folder(inner, path + b"/", depth + 1)
        except OSError as error:
            self._leave_out(path, f"it cannot be read ({error.strerror})")
        finally:
            os.close(inner)

    def _leave_out(self, path: bytes, reason: str) -> None:
        self.found.pop(path, None)
        self._skipped[path] = reason


class TooMany(SyncError):
    """There are more files than anybody would want to have sent; ``files`` are the new ones."""

    def __init__(self, found: dict[bytes, Found], unchanged: int) -> None:
        super().__init__(f"There are more than {len(found) + unchanged} files.")
        self.files = [
            (path, min(it.size, it.allocated)) for path, it in found.items() if it.kind == FILE
        ]


def found_of(status: os.stat_result) -> Found | None:
    """What matters of a status; None for what is neither file, directory nor link."""
    mode = status.st_mode
    if stat.S_ISREG(mode):
        kind = FILE
    elif stat.S_ISDIR(mode):
        return Found(FOLDER, 0, 0, False, 0, 0, 0)
    elif stat.S_ISLNK(mode):
        kind = LINK
    else:
        return None
    return Found(
        kind,
        status.st_size if kind == FILE else 0,
        status.st_mtime_ns if kind == FILE else 0,
        kind == FILE and bool(mode & 0o100),
        status.st_ino,
        status.st_ctime_ns,
        getattr(status, "st_blocks", 0) * 512 or status.st_size,
    )


def _unread(entry: Entry) -> bool:
    return entry.kind == FILE and not entry.digest


def _same(known: Known, it: Found) -> bool:
    entry = known.entry
    return (
        known.ctime == it.ctime
        and known.inode == it.inode
        and entry.size == it.size
        and entry.mtime == it.mtime
        and entry.kind == it.kind
        and entry.executable == it.executable
        and not known.racy
    )


def as_known(known: Known, status: os.stat_result) -> bool:
    """Whether a file that has been read is as it was then. This is :func:`_same` without more ado,
    because it is asked of each file before each run."""
    entry = known.entry
    mode = status.st_mode
    return (
        known.ctime == status.st_ctime_ns
        and known.inode == status.st_ino
        and entry.size == status.st_size
        and entry.mtime == status.st_mtime_ns
        and not known.racy
        and entry.kind == FILE
        and entry.digest != b""
        and mode & 0o170000 == stat.S_IFREG
        and entry.executable == bool(mode & 0o100)
    )


def _times(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode


def _tick(time_ns: int) -> int:
    return 2_000_000_000 if time_ns % 1_000_000_000 == 0 else _TICK


def _remove_remains(name: bytes, folder: int) -> None:
    """Of a transfer that was cut short: who scans has the tree for itself."""
    with suppress(OSError):
        os.unlink(name, dir_fd=folder)


def boot_id() -> str:
    """Names the time since the system was booted; empty where it is unknown."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def write_private(path: Path, data: bytes) -> None:
    """Replace a file that only this user can read (0600) at once."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
