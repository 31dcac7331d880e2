"""The machines behind one notebook, as its magics know them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mlinfra_sdk.frontend import Console, Frontend
from mlinfra_sdk.jobs import directory
from mlinfra_sdk.ledger import Machine
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request
from mlinfra_sdk.worker.messages import RunInfo
from mlinfra_sdk.worker.watchdog import End

from ..cards import RunState
from ..comms import RemoteComms
from ..replay import KernelFrontend

Place = tuple[object, ...]


class Sessions:
    """One session for each machine that this notebook uses."""

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._sessions: dict[Place, Session] = {}
        self._comms: dict[Session, RemoteComms] = {}
        self._root = Path.cwd()  # a notebook's kernel starts in its folder
        self.current: Session | None = None
        """That of the last remote cell."""
        self.noticed: Callable[[Session, End], None] = lambda session, end: None
        """Told, in another thread, when a machine is about to end while nothing runs."""

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    @property
    def notebook(self) -> str:
        """The path of the notebook, if the front end has told it."""
        return str(self._shell.user_ns.get("__session__", ""))

    @property
    def _kernel(self) -> Any:
        """The ipykernel around the shell; None in a terminal."""
        return getattr(self._shell, "kernel", None)

    def at(self, request: Request) -> Session:
        """The session for a request, which becomes the current one."""
        session = self._sessions.get(request.place)
        if session is None:
            session = self._new(request)
            self._sessions[request.place] = session
        else:
            session.configure(request)
        self.current = session
        return session

    def _new(self, request: Request) -> Session:
        session = Session(
            namespace=self._shell.user_ns,
            hidden=lambda: self._shell.user_ns_hidden,
            request=request,
            root=self._root,
            notebook=self.notebook,
        )
        session.noticed = lambda end: self.noticed(session, end)
        kernel = self._kernel
        if kernel is not None:
            comms = RemoteComms(kernel, session, partial(KernelFrontend, kernel))
            self._comms[session] = comms
            session.comms = comms.other
        return session

    def frontend(self, session: Session, card: RunState | None) -> Frontend:
        """Where the outputs of the present cell appear."""
        if self._kernel is None:
            return Console(show_result=True)
        frontend = KernelFrontend(self._kernel, self._comms[session], card)
        if session.machine is not None:
            frontend.placed(session.machine)
        return frontend

    def with_run(self, name: str, request: Request) -> tuple[Session, RunInfo]:
        """The session whose machine has this run. First this notebook's machines are looked at,
        then those that another notebook, or an earlier one, has started. Without a name the only
        run is meant."""
        own = [
            (session, info)
            for session in self
            if session.agent() is not None
            for info in session.runs()
            if name in ("", info.run, info.label)
        ]
        session, info = own[0] if len(own) == 1 else directory.the_run(name, self._runs(request))
        self._sessions[session.request.place] = session
        self.current = session
        return session, info

    def runs(self, request: Request) -> list[tuple[str, RunInfo]]:
        """(machine, run) of every run on any machine of this user."""
        return [
            (session.machine.name if session.machine else "", info)
            for session, info in self._runs(request)
        ]

    def _runs(self, request: Request) -> Iterator[tuple[Session, RunInfo]]:
        known = {session.machine.id: session for session in self if session.machine is not None}

        def session_on(machine: Machine) -> Session:
            return known.get(machine.id) or self._new(directory.request_for(machine, request))

        return directory.runs_everywhere(session_on, partial(print, file=sys.stderr))

    def forget_widgets(self, session: Session) -> None:
        """The session's kernel is gone, and its widgets with it."""
        comms = self._comms.get(session)
        if comms is not None:
            comms.close()

    def close(self) -> None:
        """End all sessions; their machines stop unless they are named or have runs."""
        for session in self:
            try:
                session.close()
            except Exception as error:
                print(f"%remote: {error}", file=sys.stderr)
        self._sessions.clear()
