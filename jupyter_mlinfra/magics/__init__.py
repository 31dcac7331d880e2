"""``%%remote`` and ``%remote``."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from mlinfra_sdk import spec
from mlinfra_sdk.errors import MlinfraError
from mlinfra_sdk.frontend import Console, Frontend
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines import lifecycle
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.namespace.sync import RemoteValue
from mlinfra_sdk.running import Result
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Layer, Request, Resolved

from ..cards import RunState
from ..comms import RemoteComms
from ..replay import KernelFrontend
from . import completion, grammar, status

Key = tuple[object, ...]


class RemoteMagics:
    """The magics of one notebook and the machines behind them."""

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self._use = Layer(grammar.USE_ORIGIN, {})
        self._sessions: dict[Key, Session] = {}
        self._comms: dict[Key, RemoteComms] = {}
        self._last: Key | None = None

    # -- %%remote ----------------------------------------------------------------------------

    def remote_cell(self, line: str, cell: str) -> None:
        """``%%remote``."""
        request = self._resolve(grammar.parse_cell(line)).request
        key = request.machine
        session = self._session(key, request)
        # The cell keeps its line numbers, which begin with the magic's own line.
        code = cell if cell.lstrip().startswith("%%") else f"#%%remote {line}\n{cell}"
        shell = self.shell
        names = cell_names(shell.transform_cell(code), shell.user_ns, code)
        card = None if request.quiet else RunState(target=request.on, gpu=str(request.gpu or ""))
        frontend = self._frontend(key, card)
        status = "error"
        try:
            result = session.execute(
                code, names, frontend=frontend, count=shell.displayhook.prompt_count, cell=cell
            )
            status = self._take(result, card)
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            if card is not None and isinstance(frontend, KernelFrontend):
                if session.machine is not None:
                    card.machine = session.machine.name
                    card.rate = session.machine.offer.price.micro_per_hour
                card.enter(status)  # type: ignore[arg-type]
                frontend.show()
        if result.error is not None:
            raise result.error

    def _take(self, result: Result, card: RunState | None) -> str:
        """What a cell leaves behind beside its variables."""
        warnings = result.report.warnings
        if card is not None:
            card.warnings = warnings
        else:
            for warning in warnings:
                print(f"%%remote: {warning}", file=sys.stderr)
        for payload in result.payload:
            self.shell.payload_manager.write_payload(payload)
        if result.value is not None:
            self.shell.displayhook.update_user_ns(result.value)
        if result.error is None:
            return "done"
        _mark_as_shown(result.error, result.traceback)
        return "interrupted" if isinstance(result.error, KeyboardInterrupt) else "error"

    def _resolve(self, layer: Layer | None = None) -> Resolved:
        layers = [*spec.configured(), self._use]
        return spec.resolve([*layers, layer] if layer else layers)

    def _session(self, key: Key, request: Request) -> Session:
        session = self._sessions.get(key)
        if session is None:
            session = Session(
                namespace=self.shell.user_ns,
                hidden=lambda: self.shell.user_ns_hidden,
                request=request,
                notebook=str(self.shell.user_ns.get("__session__", "")),
            )
            self._sessions[key] = session
            kernel = getattr(self.shell, "kernel", None)
            if kernel is not None:
                self._comms[key] = RemoteComms(kernel, session, partial(KernelFrontend, kernel))
                session.comms = self._comms[key].other
        else:
            session.configure(request)
        self._last = key
        return session

    def _frontend(self, key: Key, card: RunState | None) -> Frontend:
        kernel = getattr(self.shell, "kernel", None)
        if kernel is None:
            return Console(show_result=True)
        return KernelFrontend(kernel, self._comms[key], card)

    # -- %remote -----------------------------------------------------------------------------

    def remote_line(self, line: str) -> None:
        """``%remote``."""
        command = grammar.parse_command(line)
        handlers = {
            "status": self._status,
            "use": self._use_settings,
            "machines": self._machines,
            "stop": self._stop,
            "restart": self._restart,
            "pull": self._pull,
        }
        handlers[command.name](command)

    def _status(self, command: grammar.Command) -> None:
        status.show_status(self._resolve(), self._current())

    def _use_settings(self, command: grammar.Command) -> None:
        values = {**self._use.values, **command.settings.values}
        for name in command.unset:
            values.pop(name, None)
        self._use = Layer(grammar.USE_ORIGIN, values)
        status.show_settings(self._resolve())

    def _machines(self, command: grammar.Command) -> None:
        ledger = Ledger.open()
        try:
            status.show_machines(ledger, portal().call(lifecycle.settle(ledger)))
        finally:
            ledger.close()

    def _stop(self, command: grammar.Command) -> None:
        if command.arguments:
            self._stop_named(command.arguments[0])
            return
        session = self._current()
        if session is None or session.machine is None:
            print("This notebook has no machine.")
            return
        name = session.machine.name
        session.stop()
        print(f"{name} is stopped.")

    def _stop_named(self, name: str) -> None:
        for session in self._sessions.values():
            if session.machine is not None and session.machine.name == name:
                session.stop()
                print(f"{name} is stopped.")
                return
        ledger = Ledger.open()
        try:
            status.stop_named(ledger, name)
        finally:
            ledger.close()

    def _restart(self, command: grammar.Command) -> None:
        session = self._current()
        if session is None or session.machine is None:
            print("This notebook has no machine; the next %%remote cell starts one.")
            return
        session.restart()
        if self._last is not None and self._last in self._comms:
            self._comms[self._last].close()
        print(f"{session.machine.name} has a fresh kernel.")

    def _pull(self, command: grammar.Command) -> None:
        for name in command.arguments:
            value = self.shell.user_ns.get(name)
            if isinstance(value, RemoteValue):
                value.pull()
            elif name not in self.shell.user_ns:
                raise MlinfraError(
                    f"There is no variable {name!r}.",
                    hint="%remote pull fetches variables that stayed on a machine.",
                )

    def _current(self) -> Session | None:
        """The session of the last remote cell."""
        return self._sessions.get(self._last) if self._last is not None else None

    # -- for the shell -----------------------------------------------------------------------

    def before_cell(self, info: object = None) -> None:
        """Widgets may have changed variables over there since the last cell."""
        for session in self._sessions.values():
            session.refresh()

    def machine_names(self) -> Iterable[str]:
        """For completion."""
        ledger = Ledger.open()
        try:
            return [machine.name for machine in ledger.machines(active=True)]
        finally:
            ledger.close()

    def pullable(self) -> Iterable[str]:
        """Variables that stayed on a machine, for completion."""
        return [
            name for name, value in self.shell.user_ns.items() if isinstance(value, RemoteValue)
        ]

    def close(self) -> None:
        """End all sessions; their machines stop unless they are named."""
        for session in self._sessions.values():
            try:
                session.close()
            except Exception as error:
                print(f"%remote: {error}", file=sys.stderr)
        self._sessions.clear()


def _mark_as_shown(error: BaseException, traceback: list[str]) -> None:
    """The machine's traceback of this error has already been published, in its place."""
    error._mlinfra_traceback = traceback  # type: ignore[attr-defined]


def _show_errors_once(shell: InteractiveShell) -> None:
    """Raising a remote error here stops the notebook; it must not show it a second time."""
    original = shell.showtraceback

    def showtraceback(*args: Any, **kwargs: Any) -> None:
        kind, error, trace = sys.exc_info()
        shown = getattr(error, "_mlinfra_traceback", None)
        if shown is None:
            original(*args, **kwargs)
            return
        shell._last_traceback = shown  # type: ignore[attr-defined]
        sys.last_type, sys.last_value, sys.last_traceback = kind, error, trace

    shell.showtraceback = showtraceback  # type: ignore[method-assign]


def load(shell: InteractiveShell) -> None:
    """Install the magics and their completion in a shell."""
    if getattr(shell, "_mlinfra_magics", None) is not None:
        return
    magics = RemoteMagics(shell)
    shell._mlinfra_magics = magics  # type: ignore[attr-defined]
    cell, line = magics.remote_cell, magics.remote_line

    def remote_cell(text: str, body: str) -> None:
        cell(text, body)

    def remote_line(text: str) -> None:
        line(text)

    remote_cell.__doc__ = grammar.CELL_HELP
    remote_line.__doc__ = grammar.LINE_HELP
    register: Any = shell.register_magic_function
    register(remote_cell, "cell", "remote")
    register(remote_line, "line", "remote")
    shell.events.register("pre_run_cell", magics.before_cell)
    completion.install(shell, machines=magics.machine_names, pullable=magics.pullable)
    _show_errors_once(shell)
    atexit.register(magics.close)
