"""One remote cell: from its text to its outputs, its variables and its card."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlinfra_sdk.errors import (
    BudgetSpent,
    KernelDied,
    MachineLost,
    MlinfraError,
    RunCancelled,
    RunDetached,
)
from mlinfra_sdk.frontend import Console, Frontend
from mlinfra_sdk.jobs import RunHandle
from mlinfra_sdk.ledger.history import cell_key
from mlinfra_sdk.machines.ends import in_words, notice
from mlinfra_sdk.namespace.analysis import CellNames, cell_names
from mlinfra_sdk.running import Outcome, Result
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request
from mlinfra_sdk.worker.watchdog import End

from ..cards import RunState
from ..cards.state import Phase
from ..replay import KernelFrontend
from .sessions import Sessions


class Cells:
    """Runs cells on the sessions of a notebook."""

    def __init__(self, shell: Any, sessions: Sessions) -> None:
        self._shell = shell
        self._sessions = sessions
        self._background: list[tuple[RunHandle, Session, Frontend, RunState | None]] = []
        self._latest: dict[Session, tuple[Frontend, RunState | None]] = {}
        """Where the last cell of each session was shown."""
        sessions.noticed = self._noticed

    def run(self, request: Request, line: str, cell: str) -> RunHandle | None:
        """Run a cell; a detached or background one gives a handle."""
        session = self._sessions.at(request)
        # The cell keeps its line numbers, which begin with the magic's own line.
        code = cell if cell.lstrip().startswith("%%") else f"#%%remote {line}\n{cell}"
        names = cell_names(self._shell.transform_cell(code), self._shell.user_ns, code)
        card = new_card(request)
        frontend = self._sessions.frontend(session, card)
        if request.detach or request.background:
            return self._start(session, frontend, card, code, names, cell)
        key = cell_key(cell)
        count = self._shell.displayhook.prompt_count
        self.show(
            session,
            frontend,
            card,
            lambda: session.execute(code, names, frontend=frontend, count=count, cell=key),
        )
        return None

    def _noticed(self, session: Session, end: End) -> None:
        """A machine on which nothing runs is about to end: its last card tells."""
        frontend, card = self._latest.get(session, (Console(), None))
        if card is not None:
            card.stops = time.time() + end.seconds
            card.ending = True
        frontend.note(notice(end))
        if card is not None:
            card.ending = False  # once is enough

    def extended(self, session: Session, ends: list[End]) -> None:
        """A machine's end was put off: its last card tells."""
        frontend, card = self._latest.get(session, (None, None))
        if card is not None and frontend is not None:
            card.stops = time.time() + ends[0].seconds
            frontend.note(f"Put off: it stops {in_words(ends, busy=False)[0]}.")

    def show(
        self,
        session: Session,
        frontend: Frontend,
        card: RunState | None,
        execute: Callable[[], Result],
    ) -> None:
        """Wait for a result and take it over; raises what the run raised."""
        status: Phase = "error"
        self._latest[session] = frontend, card
        try:
            result = execute()
            status = self._take(result, card)
        except KeyboardInterrupt as error:
            status = "interrupted"
            _show_without_frames(error)
            raise
        except RunDetached:
            status = "detached"
            raise
        except (KernelDied, MachineLost, BudgetSpent):
            status = "lost"
            raise
        finally:
            _finish(session, frontend, card, status)
        if result.error is not None:
            raise result.error

    def _start(
        self,
        session: Session,
        frontend: Frontend,
        card: RunState | None,
        code: str,
        names: CellNames,
        cell: str,
    ) -> RunHandle:
        request = session.request
        try:
            handle = session.start(
                code,
                names,
                count=self._shell.displayhook.prompt_count,
                frontend=frontend if request.background else None,
                label=request.name,
                cell=cell_key(cell),
                new_kernel=request.kernel == "new",
            )
        except BaseException:
            _finish(session, frontend, card, "error")
            raise
        frontend.begun(handle.name)
        if not request.background:
            if card is not None:
                card.note = f"%remote attach {handle.name} brings it back."
            _finish(session, frontend, card, "detached")
            return handle
        if card is not None:
            card.background = card.notify = True
        frontend.phase("running")
        self._background.append((handle, session, frontend, card))
        handle.when_done(lambda: self._has_ended(handle, session, frontend, card))
        return handle

    def _has_ended(
        self, handle: RunHandle, session: Session, frontend: Frontend, card: RunState | None
    ) -> None:
        """A background run has ended: tell it, and take it over as soon as no cell runs."""
        if (phase := _phase_after(handle)) is not None:
            _finish(session, frontend, card, phase)
        kernel = getattr(self._shell, "kernel", None)
        if kernel is not None:
            kernel.io_loop.add_callback(self.take_ended)

    @contextmanager
    def short_card(self, session: Session) -> Iterator[Frontend]:
        """A card for something that is no run, which appears if that takes a while."""
        card = new_card(session.request)
        frontend = self._sessions.frontend(session, card)
        status: Phase = "error"
        try:
            yield frontend
            status = "done"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            if card is not None and card.seconds:
                _finish(session, frontend, card, status)

    def take_ended(self) -> None:
        """Take over the background runs that have ended."""
        ended = [it for it in self._background if it[0].done()]
        self._background = [it for it in self._background if it not in ended]
        for handle, session, frontend, card in ended:
            status: Phase = _phase_after(handle) or "error"
            try:
                result = handle.collect()
                if card is not None:
                    card.warnings = result.report.warnings
            except MlinfraError as error:
                frontend.note(str(error))
            _finish(session, frontend, card, status)

    def _take(self, result: Result, card: RunState | None) -> Phase:
        """What a cell leaves behind beside its variables."""
        if card is not None:
            card.warnings = result.report.warnings
        else:
            for warning in result.report.warnings:
                print(f"%%remote: {warning}", file=sys.stderr)
        for payload in result.payload:
            self._shell.payload_manager.write_payload(payload)
        if result.value is not None:
            self._shell.displayhook.update_user_ns(result.value)
        if result.error is None:
            return "done"
        mark_as_shown(result.error, result.traceback)
        return "interrupted" if isinstance(result.error, KeyboardInterrupt) else "error"


def new_card(request: Request) -> RunState | None:
    """The card of a run, unless the user wants none."""
    return None if request.quiet else RunState(target=request.target, gpu=str(request.gpu or ""))


def _finish(session: Session, frontend: Frontend, card: RunState | None, phase: Phase) -> None:
    """The card's last state."""
    if card is None or not isinstance(frontend, KernelFrontend):
        return
    if session.machine is not None:
        frontend.placed(session.machine)
        end = session.next_end() if phase != "lost" else None
        card.stops = time.time() + end.seconds if end is not None else None
    if card.phase != phase:
        card.enter(phase)
    frontend.show()
    card.notify = False  # once is enough


def _phase_after(handle: RunHandle) -> Phase | None:
    """How a run that was followed has ended, as far as it has."""
    match handle.ending():
        case None:
            return None
        case Outcome(reply={"status": "ok"}):
            return "done"
        case Outcome(reply={"ename": "KeyboardInterrupt"}) | RunCancelled():
            return "interrupted"
        case Outcome():
            return "error"
        case RunDetached():
            return "detached"
    return "lost"


def _show_without_frames(error: KeyboardInterrupt) -> None:
    """It came while the machine was starting, say: all frames are ours and help no user."""
    lines = ["\x1b[31mKeyboardInterrupt\x1b[39m"]
    error._render_traceback_ = lambda: lines  # type: ignore[attr-defined]


def mark_as_shown(error: BaseException, traceback: list[str]) -> None:
    """The machine's traceback of this error has already been published, in its place."""
    error._mlinfra_traceback = traceback  # type: ignore[attr-defined]


def _do_not_warn_of_exit(shell: Any) -> None:
    """Until the end of this cell: the machine's IPython has said how to exit."""
    show = warnings.showwarning
    warnings.showwarning = lambda *arguments, **named: None

    def restore(result: object) -> None:
        warnings.showwarning = show
        shell.events.unregister("post_run_cell", restore)

    shell.events.register("post_run_cell", restore)


def show_errors_once(shell: Any) -> None:
    """Raising a remote error here stops the notebook; it must not show it a second time."""
    original = shell.showtraceback

    def showtraceback(*args: Any, **kwargs: Any) -> None:
        kind, error, trace = sys.exc_info()
        shown = getattr(error, "_mlinfra_traceback", None)
        if shown is None:
            original(*args, **kwargs)
            return
        if isinstance(error, SystemExit):
            _do_not_warn_of_exit(shell)
        shell._last_traceback = shown
        sys.last_type, sys.last_value, sys.last_traceback = kind, error, trace

    shell.showtraceback = showtraceback
