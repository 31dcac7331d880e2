"""``%%remote`` and ``%remote``."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Iterable
from typing import Any

from IPython.core.interactiveshell import InteractiveShell
from IPython.display import publish_display_data

from mlinfra_sdk import cli_checkpoints, cli_quote, spec
from mlinfra_sdk.checkpoints.store import CheckpointStore
from mlinfra_sdk.errors import MlinfraError
from mlinfra_sdk.jobs import RunHandle
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines import lifecycle
from mlinfra_sdk.machines.ends import in_words
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.namespace.sync import RemoteValue
from mlinfra_sdk.predict import Past
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Layer, Request, Resolved
from mlinfra_sdk.units import format_size

from . import compare, completion, grammar, hint, status
from .cells import Cells, new_card, show_errors_once
from .local_cells import LocalCells
from .sessions import Sessions

_POLL = 0.5


class RemoteMagics:
    """The magics of one notebook."""

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self.sessions = Sessions(shell)
        self.cells = Cells(shell, self.sessions)
        self.local_cells = LocalCells()
        self._settings = Layer(grammar.USE_ORIGIN, {})

    def remote_cell(self, line: str, cell: str) -> RunHandle | None:
        """``%%remote``."""
        self.local_cells.remote(cell)
        return self.cells.run(self._resolve(grammar.parse_cell(line)).request, line, cell)

    def remote_line(self, line: str) -> None:
        """``%remote``."""
        command = grammar.parse_command(line)
        handlers = {
            "status": self._status,
            "use": self._use,
            "machines": self._machines,
            "stop": self._stop,
            "restart": self._restart,
            "extend": self._extend,
            "pull": self._pull,
            "sync": self._sync,
            "runs": self._runs,
            "attach": self._attach,
            "logs": self._logs,
            "wait": self._wait,
            "cancel": self._cancel,
            "catalog": self._catalog,
            "cost": self._cost,
            "quote": self._quote,
            "checkpoints": self._checkpoints,
        }
        handlers[command.name](command)

    def compare_cell(self, line: str, cell: str) -> None:
        """``%%compare``."""
        compare.compare_cell(self.shell, line, cell, self._settings)

    def _resolve(self, layer: Layer | None = None) -> Resolved:
        layers = [*spec.configured(), self._settings]
        return spec.resolve([*layers, layer] if layer else layers)

    @property
    def _request(self) -> Request:
        return self._resolve().request

    # -- machines ----------------------------------------------------------------------------

    def _status(self, command: grammar.Command) -> None:
        status.show_status(self._resolve(), self.sessions.current)

    def _use(self, command: grammar.Command) -> None:
        values = {**self._settings.values, **command.settings.values}
        for name in command.unset:
            values.pop(name, None)
        self._settings = Layer(grammar.USE_ORIGIN, values)
        status.show_settings(self._resolve())

    def _machines(self, command: grammar.Command) -> None:
        ledger = Ledger.open()
        try:
            status.show_machines(ledger, portal().call(lifecycle.settle(ledger)))
        finally:
            ledger.close()

    def _catalog(self, command: grammar.Command) -> None:
        status.show_catalog(command.arguments)

    def _cost(self, command: grammar.Command) -> None:
        ledger = Ledger.open()
        try:
            status.show_cost(ledger, command.arguments[0] if command.arguments else "day")
        finally:
            ledger.close()

    def _checkpoints(self, command: grammar.Command) -> None:
        cli_checkpoints.show(CheckpointStore.default(), *command.arguments)

    def _quote(self, command: grammar.Command) -> None:
        found = cli_quote.ask(self._resolve(command.settings).request)
        key, title = self.local_cells.latest
        notebook, local = self.sessions.notebook, self.local_cells.past
        known = cli_quote.predictions(found, notebook, key, local) if key else []
        cli_quote.show(found, known, title)

    def _stop(self, command: grammar.Command) -> None:
        if command.arguments:
            self._stop_named(command.arguments[0])
            return
        session = self.sessions.current
        if session is None or session.machine is None:
            print("This notebook has no machine.")
            return
        name = session.machine.name
        session.stop()
        self.sessions.forget_widgets(session)
        print(f"{name} is stopped.")

    def _stop_named(self, name: str) -> None:
        for session in self.sessions:
            if session.machine is not None and session.machine.name == name:
                session.stop()
                self.sessions.forget_widgets(session)
                print(f"{name} is stopped.")
                return
        ledger = Ledger.open()
        try:
            status.stop_named(ledger, name)
        finally:
            ledger.close()

    def _extend(self, command: grammar.Command) -> None:
        name, seconds = grammar.extension(command.arguments)
        session = next((it for it in self.sessions if _name_of(it) == name), None)
        if not name:
            session = self.sessions.current
        if session is not None and session.machine is not None:
            found = session.extend(seconds)
            self.cells.extended(session, found)
            print(f"{session.machine.name} stops {in_words(found, busy=False)[0]}.")
        elif name:
            ledger = Ledger.open()
            try:
                status.extend_named(ledger, name, seconds)
            finally:
                ledger.close()
        else:
            print("This notebook has no machine; the next %%remote cell starts one.")

    def _restart(self, command: grammar.Command) -> None:
        session = self.sessions.current
        if session is None or session.machine is None:
            print("This notebook has no machine; the next %%remote cell starts one.")
            return
        session.restart()
        self.sessions.forget_widgets(session)
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

    def _sync(self, command: grammar.Command) -> None:
        session = self.sessions.current
        if session is None or session.machine is None:
            print("This notebook has no machine; the next %%remote cell brings its files there.")
            return
        if "--dry-run" in command.arguments:
            status.show_moves(session.sync_preview())
            return
        names = [word for word in command.arguments if not word.startswith("--")]
        delete = "--delete" in command.arguments
        with self.cells.short_card(session) as frontend:
            report = session.sync(*names, delete=delete, frontend=frontend)
        status.show_synced(report)

    # -- runs --------------------------------------------------------------------------------

    def _runs(self, command: grammar.Command) -> None:
        status.show_runs(self.sessions.runs(self._request))

    def _attach(self, command: grammar.Command) -> None:
        request = self._request
        name = command.arguments[0] if command.arguments else ""
        session, info = self.sessions.with_run(name, request)
        if session.request.place != request.place and session.machine is not None:
            # What comes next in this notebook belongs to the machine that holds its variables.
            values = {**self._settings.values, "machine": session.machine.name}
            self._settings = Layer(grammar.USE_ORIGIN, values)
        card = new_card(request)
        if card is not None:
            card.notify = True
        frontend = self.sessions.frontend(session, card)
        self.cells.show(
            session, frontend, card, lambda: session.attach(info.run, frontend=frontend)
        )

    def _logs(self, command: grammar.Command) -> None:
        session, info = self.sessions.with_run(command.arguments[0], self._request)
        frontend = self.sessions.frontend(session, None)
        session.watch(info.run, frontend.publish, until_end="-f" in command.arguments)

    def _wait(self, command: grammar.Command) -> None:
        session, info = self.sessions.with_run(command.arguments[0], self._request)
        while not info.ended:
            time.sleep(_POLL)
            left = [it for it in session.runs() if it.run == info.run]
            if not left:
                print(f"{command.arguments[0]} has been collected elsewhere.")
                return
            info = left[0]
        print(f"{command.arguments[0]} has ended: {info.status}.")

    def _cancel(self, command: grammar.Command) -> None:
        session, info = self.sessions.with_run(command.arguments[0], self._request)
        session.cancel(info.run)
        what = "discarded" if info.ended else "cancelled"
        print(f"{command.arguments[0]} is {what}.")

    # -- for the shell -----------------------------------------------------------------------

    def before_cell(self, info: object = None) -> None:
        """Bring here what has changed over there since the last cell."""
        self.cells.take_ended()
        for session in self.sessions:
            session.refresh()
        self.local_cells.begin()

    def after_cell(self, result: Any) -> None:
        """A cell here has told how long it takes. It may miss a file that is too large to have come
        from a machine: say so."""
        run = self.local_cells.end(getattr(result.info, "raw_cell", "") or "", bool(result.success))
        if run is not None:
            self._hint(run)
        error = getattr(result, "error_in_exec", None)
        if not isinstance(error, FileNotFoundError) or not isinstance(error.filename, str):
            return
        for session in self.sessions:
            size = session.stays_there(error.filename)
            if size is not None and session.machine is not None:
                print(
                    f"{error.filename} ({format_size(size)}) lies on {session.machine.name}: "
                    f"`%remote sync {error.filename}` brings it here.",
                    file=sys.stderr,
                )

    def _hint(self, run: Past) -> None:
        """Say once for each cell what a GPU may make of it; never at the cost of an error."""
        try:
            limit = self._request.hint
            if limit is None or run.seconds < limit or not self.local_cells.first(run):
                return
            text = hint.after(run, self.sessions.notebook, self.local_cells.past)
        except MlinfraError:
            return
        if text:
            publish_display_data({"text/plain": text}, {"mlinfra": {"hint": True}})

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


def _name_of(session: Session) -> str:
    return session.machine.name if session.machine is not None else ""


def load(shell: InteractiveShell) -> None:
    """Install the magics and their completion in a shell."""
    if getattr(shell, "_mlinfra_magics", None) is not None:
        return
    magics = RemoteMagics(shell)
    shell._mlinfra_magics = magics  # type: ignore[attr-defined]
    cell, line = magics.remote_cell, magics.remote_line

    def remote_cell(text: str, body: str) -> RunHandle | None:
        return cell(text, body)

    def remote_line(text: str) -> None:
        line(text)

    def compare_cell(text: str, body: str) -> None:
        magics.compare_cell(text, body)

    compare_cell.__doc__ = compare.HELP
    remote_cell.__doc__ = grammar.CELL_HELP
    remote_line.__doc__ = grammar.LINE_HELP
    register: Any = shell.register_magic_function
    register(remote_cell, "cell", "remote")
    register(remote_line, "line", "remote")
    register(compare_cell, "cell", "compare")
    shell.events.register("pre_run_cell", magics.before_cell)
    shell.events.register("post_run_cell", magics.after_cell)
    completion.install(shell, machines=magics.machine_names, pullable=magics.pullable)
    show_errors_once(shell)
    atexit.register(magics.sessions.close)
