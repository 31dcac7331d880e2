"""What is known of a folder and its twin: what lies here and there, and what was common last."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from mlinfra_sdk.errors import SyncError
from mlinfra_sdk.objects.bulk import Source
from mlinfra_sdk.objects.store import ChunkStore, chunk_digest

from . import limits, names
from .entries import Entry
from .ignore import RuleFile
from .messages import (
    AnyMessage,
    Expect,
    List,
    Listing,
)
from .reports import Report
from .tree import TooMany, Tree, write_private

T = TypeVar("T")

_FORGOTTEN_S = 30 * 86400
"""Seconds after which the record of a machine that was never used again is removed."""


class Moving(Protocol):
    """A transfer that goes on meanwhile."""

    total: int
    """Its bytes, as far as they are known."""

    def wait(self, progress: Callable[[int, int], None]) -> object:
        """Until its end."""
        ...

    def cancel(self) -> None:
        """What has not been sent need not be."""
        ...


class Peer(Protocol):
    """The machine's side, over a link."""

    def ask(self, message: AnyMessage, kind: type[T]) -> T:
        """Send a message and wait for its answer."""
        ...

    def begin(self, message: AnyMessage, kind: type[T]) -> Future[T]:
        """Send a message; the answer comes later."""
        ...

    def upload(self, digests: list[bytes], source: Source, expect: Expect | None = None) -> Moving:
        """Begin to send those of the chunks that the machine lacks; over when it has them.
        ``expect`` tells it what large files they belong to."""
        ...

    def download(self, digests: list[bytes], progress: Callable[[int, int], None]) -> None:
        """Bring chunks into the local store."""
        ...


class _Record(msgspec.Struct, array_like=True):
    """The last common state, as it lies on disk."""

    root: str
    machine: str
    base: dict[bytes, bytes]


class Knowledge:
    """The folder ``root`` and its twin on one machine.

    ``state`` is the directory for what is known of both; ``excluded`` is left out if it lies below
    the root. Raises :class:`RequestError` for a root that nobody wants to have sent.
    """

    def __init__(
        self,
        root: Path,
        peer: Peer,
        store: ChunkStore,
        *,
        machine: str,
        machine_name: str,
        state: Path,
        excluded: Iterable[Path] = (),
    ) -> None:
        limits.check_root(root)
        self.root = root
        self.name = workspace_name(root)
        self.there = ""
        """The folder on the machine."""
        self.stale = True
        """Whether something may have changed on the machine since it was last asked."""
        self.eager_limit = 64_000_000
        self.sync_limit = 500_000_000
        self._peer = peer
        self._store = store
        self._machine = machine
        self._machine_name = machine_name
        self._state = state
        key = self.name.rsplit("-", 1)[-1]
        self._record = state / f"{key}-{machine}.base"
        self._lock = state / f"{key}.lock"
        _make_private(state)
        _forget_old(state)
        self._tree = Tree(
            root,
            state / f"{key}.index",
            {below for path in excluded if (below := limits.is_below(path, root))},
        )
        self._base: dict[bytes, bytes] = {}
        self._base_saved = True
        self._entries: dict[bytes, Entry] = {}
        """What lies on the machine."""
        self._skipped: dict[bytes, str] = {}
        """What takes no part there."""
        self._epoch, self._change = "", 0
        self._rules: list[RuleFile] | None = None
        """As they were when this side was last looked at."""
        self._told: set[object] = set()
        """What the user has been told and need not hear again."""
        self._quiet: object = None
        """By what one knows that nothing has changed since there was nothing to do."""
        self._failing: dict[bytes, str] = {}
        """Why paths could not follow, as the user was told."""
        self._left_over = False
        """Whether something of the plan could not be done."""
        self._done = self._total = 0

    def exclude(self, path: Path) -> None:
        """From now on leave this path out, if it lies below the root."""
        below = limits.is_below(path, self.root)
        if below:
            self._tree.exclude(below)
            self._quiet = None

    # -- looking -----------------------------------------------------------------------------

    def _look(self, *, again: bool) -> None:
        """Find out what lies here and, if need be, there; at the same time, once the rules are
        known that hold there too."""
        rules = self._rules
        ask = self.stale or again or not self._epoch
        asked = self._ask_for_list(rules, ()) if ask and rules is not None else None
        try:
            self._tree.scan(before_reading=self._guard_reading, most=4 * limits.MOST_FILES)
        except TooMany as error:
            limits.check_size(error.files, self.sync_limit)
            raise
        except FileNotFoundError:
            limits.check_root(self.root)
            raise
        self._rules = list(self._tree.rules.files.values())
        if asked is not None:
            self._take_list(asked.result())
        if ask and rules != self._rules:
            self._list(())

    def _guard_reading(self, files: list[tuple[bytes, int]]) -> None:
        """What nobody has seen yet would be sent: say so before it is even read."""
        limits.check_size([it for it in files if it[0] not in self._base], self.sync_limit)

    def _list(self, wanted: Collection[bytes]) -> None:
        self._take_list(self._ask_for_list(self._rules or [], wanted).result())

    def _ask_for_list(self, rules: list[RuleFile], wanted: Collection[bytes]) -> Future[Listing]:
        request = List(self.name, rules, self._epoch, self._change, self.eager_limit, list(wanted))
        return self._peer.begin(request, Listing)

    def _take_list(self, listing: Listing) -> None:
        if listing.whole:
            self._entries = {}
        for entry in listing.entries:
            names.parts(entry.path)
            self._entries[entry.path] = entry
        for path in listing.gone:
            self._entries.pop(path, None)
        self._skipped = listing.skipped
        self._epoch, self._change = listing.epoch, listing.change
        self.there = listing.root
        self.stale = False

    def _signature(self) -> object:
        hidden = len(self._tree.skipped), len(self._skipped)
        return self._tree.changes, self._epoch, self._change, hidden, self.eager_limit

    def _warn(self, report: Report, text: str) -> None:
        if self._tell(text):
            report.warnings.append(text)

    def _tell(self, thing: object) -> bool:
        new = thing not in self._told
        self._told.add(thing)
        return new

    # -- the record --------------------------------------------------------------------------

    def _common(self, path: bytes, state: bytes) -> None:
        if state:
            self._base[path] = state
        else:
            self._base.pop(path, None)
        self._base_saved = False

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time changes a folder; the record may be newer than ours."""
        fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            self._load()
            yield
        finally:
            os.close(fd)

    def _load(self) -> None:
        with suppress(OSError, msgspec.MsgspecError):
            record = msgspec.msgpack.decode(self._record.read_bytes(), type=_Record)
            if (record.root, record.machine) == (str(self.root), self._machine):
                if record.base != self._base:
                    # Another process has gone on: what it has brought there is not gone from there.
                    self.stale = True
                self._base, self._base_saved = record.base, True

    def _save(self) -> None:
        if not self._base_saved:
            record = _Record(str(self.root), self._machine, self._base)
            try:
                write_private(self._record, msgspec.msgpack.encode(record))
            except OSError as error:
                raise SyncError(
                    f"What both sides have in common cannot be written down: {error.strerror}.",
                    hint="Free some space, or set MLINFRA_HOME to another disk.",
                ) from None
            self._base_saved = True
        self._tree.save()


def workspace_name(root: Path) -> str:
    """The name of this root's folder on machines: readable, and its own for each root and host."""
    digest = chunk_digest(os.fsencode(f"{platform.node()}:{root}")).hex()[:12]
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", root.name).strip(".-")[:40] or "work"
    return f"{word}-{digest}"


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _forget_old(state: Path) -> None:
    for record in state.glob("*.base"):
        with suppress(OSError):
            if time.time() - record.stat().st_mtime > _FORGOTTEN_S:
                record.unlink()
