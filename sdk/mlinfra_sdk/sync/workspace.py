"""The notebook's side of a workspace: compares, decides, and has it done."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Collection
from contextlib import suppress

from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.units import format_size

from . import limits, names
from .carry import Carrier, Progress, bytes_to_send
from .entries import ABSENT, FILE, FOLDER, Entry
from .merge import Plan, merge
from .reports import Move, Report

_ROUNDS = 4
_NAMED = 5


class Workspace(Carrier):
    """The folder ``root`` and its twin on one machine."""

    # -- what a session does -----------------------------------------------------------------

    def sync(
        self,
        progress: Progress = lambda done, total: None,
        *,
        fetch: Collection[bytes] = (),
        delete: bool = False,
    ) -> Report:
        """Make both sides alike. Files above ``eager_limit`` bytes come here only if ``fetch``
        names them or a folder above them; ``delete`` confirms removals in large numbers.

        It may be interrupted at any time; the next one goes on. Raises :class:`SyncError`,
        :class:`RequestError` where too much would be sent, and errors of the link.
        """
        report = Report()
        with self._alone():
            try:
                for number in range(_ROUNDS):
                    self._look(again=number > 0)
                    if self._quiet == self._signature() and not fetch:
                        break
                    plan, listed = self._plan(fetch)
                    if number == 0:
                        self._guard(plan)
                    held = self._hold_removals(plan, report, delete)
                    if self._carry_out(plan, report, progress):
                        self._say(report, listed)
                        if not (listed or held or self._left_over):
                            self._quiet = self._signature()
                        break
                    self.stale = True
                else:
                    self._warn(report, "Some files changed all the time and follow later.")
            finally:
                self._save()
        return report

    def preview(self) -> list[Move]:
        """What :meth:`sync` would do now."""
        with self._alone():
            self.stale = True
            self._look(again=False)
            plan, listed = self._plan(())
        here, there = self._tree.entries(), self._entries
        rows = [("send", path, here[path].size) for path in plan.up]
        rows += [("fetch", path, there[path].size) for path in plan.down]
        rows += [("delete there", path, 0) for path in plan.remove_there]
        rows += [("delete here", path, 0) for path in plan.remove_here]
        rows += [("conflict", path, there[path].size) for path in plan.aside]
        rows += [("stays there", entry.path, entry.size) for entry in listed]
        return [Move(what, names.shown(path), size) for what, path, size in rows]

    def forget(self) -> None:
        """The machine is gone, and with it what it had."""
        with suppress(OSError):
            self._record.unlink()

    def stays_there(self, path: str) -> int | None:
        """The size of a file that lies on the machine and, as far as is known, not here."""
        try:
            below = self.relative(path)
        except RequestError:
            return None
        entry = self._entries.get(below)
        here = below in self._tree.known
        return entry.size if entry is not None and entry.kind == FILE and not here else None

    def relative(self, path: str) -> bytes:
        """A path that the user wrote, relative to the root. Raises :class:`RequestError`."""
        absolute = os.path.normpath(os.path.join(os.getcwd(), os.path.expanduser(path)))
        below = os.path.relpath(absolute, self.root)
        if below == "." or below.startswith(".."):
            raise RequestError(
                f"{path} does not lie below {self.root}.", hint="Name files of this workspace."
            )
        return os.fsencode(below)

    # -- deciding ----------------------------------------------------------------------------

    def _plan(self, fetch: Collection[bytes]) -> tuple[Plan, list[Entry]]:
        """What is to be done, and the entries that are too large to come by themselves."""
        takes_part = self._participation()
        base = {path: it for path, it in self._base.items() if takes_part(path)}
        self._forget_ignored()
        here = {
            path: known.entry.state for path, known in self._tree.known.items() if takes_part(path)
        }
        unread = [
            entry.path
            for entry in self._entries.values()
            if entry.kind == FILE
            and not entry.digest
            and (entry.path in here or entry.path in base or _named(entry.path, fetch))
        ]
        if unread:
            self._list(unread)
        there = {path: it.state for path, it in self._entries.items() if takes_part(path)}
        plan = merge(base, here, there)
        for path in plan.settled:
            self._common(path, here.get(path, ABSENT))
        listed = self._too_large(plan, fetch)
        return plan, listed

    def _participation(self) -> Callable[[bytes], bool]:
        """Which paths take part at all: none that a side must leave out, nor what lies below."""
        hidden = self._tree.skipped.keys() | self._skipped.keys()
        rules = self._tree.rules
        verdicts: dict[bytes, bool] = {b"": True}

        def folder_takes_part(folder: bytes) -> bool:
            verdict = verdicts.get(folder)
            if verdict is None:
                verdict = (
                    folder not in hidden
                    and not rules.ignored(folder, True)
                    and folder_takes_part(posixpath.dirname(folder))
                )
                verdicts[folder] = verdict
            return verdict

        def takes_part(path: bytes) -> bool:
            if path in hidden or not folder_takes_part(posixpath.dirname(path)):
                return False
            entry = self._entries.get(path)
            return not rules.ignored(path, entry is not None and entry.kind == FOLDER)

        return takes_part

    def _forget_ignored(self) -> None:
        """What is ignored from now on is no longer common: it must not count as removed when the
        rules change again."""
        rules = self._tree.rules
        for path in [
            path
            for path, state in self._base.items()
            if rules.covers(path, state == FOLDER.encode())
        ]:
            self._common(path, ABSENT)

    def _too_large(self, plan: Plan, fetch: Collection[bytes]) -> list[Entry]:
        """Take out of the plan what is not fetched now."""
        listed, room = [], self.sync_limit
        coming = sorted((self._entries[path] for path in plan.down), key=lambda it: it.size)
        for entry in coming:
            if _named(entry.path, fetch):
                continue
            room -= entry.size
            if entry.size > self.eager_limit or room < 0:
                listed.append(entry)
        left = {entry.path for entry in listed}
        plan.down = [path for path in plan.down if path not in left]
        return listed

    def _guard(self, plan: Plan) -> None:
        pieces = {piece for entry in self._entries.values() for piece in entry.chunks}
        limits.check_size(
            [
                (path, bytes_to_send(self._tree.known[path].entry, pieces))
                for path in plan.up
                if self._tree.known[path].entry.kind == FILE
            ],
            self.sync_limit,
        )

    def _hold_removals(self, plan: Plan, report: Report, delete: bool) -> bool:
        """Never remove most of a workspace without being told to; gives whether that was so."""
        held = False
        folder = FOLDER.encode()
        known = sum(1 for state in self._base.values() if state != folder)
        for removals, said in (
            (plan.remove_here, "were deleted on the machine and are kept here"),
            (plan.remove_there, "were deleted here and are kept on the machine"),
        ):
            files = [path for path in removals if self._base.get(path) != folder]
            if not delete and limits.suspicious(len(files), known):
                removals.clear()
                held = True
                self._warn(
                    report,
                    f"{len(files)} of {known} files {said}: `%remote sync --delete` deletes them.",
                )
        return held

    # -- telling -----------------------------------------------------------------------------

    def _say(self, report: Report, listed: list[Entry]) -> None:
        """What the user should know, once."""
        for entry in listed:
            if self._tell(entry):
                report.listed.append((names.shown(entry.path), entry.size))
        if report.listed:
            some = ", ".join(
                f"{path} ({format_size(size)})" for path, size in report.listed[:_NAMED]
            )
            more = len(report.listed) - _NAMED
            report.warnings.append(
                f"Stays on the machine: {some}{f' and {more} more' if more > 0 else ''}."
                " `%remote sync PATH` brings it here."
            )
        for skipped in (self._tree.skipped, self._skipped):
            for path, reason in skipped.items():
                if reason:
                    self._warn(report, f"{names.shown(path)} is left out: {reason}.")
        for warning in self._tree.rules.warnings:
            self._warn(report, warning)


def _named(path: bytes, fetch: Collection[bytes]) -> bool:
    return path in fetch or any(folder in fetch for folder in names.ancestors(path))
