"""The machines behind one notebook, as its magics know them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec

from mlinfra_sdk.errors import MlinfraError, RequestError
from mlinfra_sdk.frontend import Console, Frontend
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines import lifecycle
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request, did_you_mean
from mlinfra_sdk.worker.messages import RunInfo

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
        self.current: Session | None = None
        """That of the last remote cell."""

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

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
            notebook=str(self._shell.user_ns.get("__session__", "")),
        )
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
        return KernelFrontend(self._kernel, self._comms[session], card)

    def with_run(self, name: str, request: Request) -> tuple[Session, RunInfo]:
        """The session whose machine has this run. Machines that another notebook, or an earlier
        one, has started are looked at too. Without a name the only run is meant."""
        found = list(self._runs(request))
        matching = [(it, info) for it, info in found if name in ("", info.run, info.label)]
        if len(matching) == 1:
            session, info = matching[0]
            self._sessions[session.request.place] = session
            self.current = session
            return session, info
        names = [info.label or info.run for _, info in found]
        if len(matching) > 1:
            problem = "There are several runs" if not name else f"Several runs are called {name!r}"
            raise RequestError(f"{problem}.", hint=f"Name one: {', '.join(names)}.")
        problem = f"There is no run {name!r}.{did_you_mean(name, names)}" if name else "No run."
        raise RequestError(problem, hint=f"Runs: {', '.join(names) or 'none'}.")

    def runs(self, request: Request) -> list[tuple[str, RunInfo]]:
        """(machine, run) of every run on any machine of this user."""
        return [
            (session.machine.name if session.machine else "", info)
            for session, info in self._runs(request)
        ]

    def _runs(self, request: Request) -> Iterator[tuple[Session, RunInfo]]:
        known = {session.machine.id: session for session in self if session.machine is not None}
        ledger = Ledger.open()
        try:
            machines = portal().call(lifecycle.with_runs(ledger))
        finally:
            ledger.close()
        for machine in machines:
            session = known.get(machine.id)
            if session is None:
                there = msgspec.structs.replace(
                    request, on=machine.provider, machine=machine.name, gpu=None
                )
                session = self._new(there)
            try:
                runs = session.runs()
            except MlinfraError as error:
                print(f"{machine.name} does not answer: {error}", file=sys.stderr)
                continue
            for info in runs:
                yield session, info

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
