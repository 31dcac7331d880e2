"""The commands of ``mlinfra`` that look after runs: what notebooks and scripts have left running.

A terminal has no place for variables: what is shown here stays uncollected on its machine until a
notebook attaches it, or ``mlinfra cancel`` discards it.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from mlinfra_sdk import spec
from mlinfra_sdk.frontend import Console
from mlinfra_sdk.jobs import directory
from mlinfra_sdk.ledger import Machine
from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.namespace.imports import imports_of_source
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request
from mlinfra_sdk.terminal import console, print_json, say
from mlinfra_sdk.units import format_duration
from mlinfra_sdk.worker.messages import RunInfo
from mlinfra_sdk.worker.records import Record
from mlinfra_sdk.worker.script import ScriptFailed, run_detached

_POLL = 0.5
_COLOR = re.compile("\x1b\\[[0-9;]*m")


def dispatch(options: argparse.Namespace) -> int:
    """Carry out one of these commands; gives the exit status."""
    if options.command == "runs":
        return _runs(options.json)
    session, info = directory.the_run(options.name or "", _everywhere())
    if options.command == "attach":
        return _attach(session, info)
    if options.command == "logs":
        session.watch(info.run, Terminal().publish, until_end=options.follow)
        return 0
    if options.command == "wait":
        return _wait(session, info)
    session.cancel(info.run)
    print(f"{_name(info)} is {'discarded' if info.ended else 'cancelled'}.")
    return 0


def imports_of_script(file: str, source: bytes) -> set[str]:
    """What a script imports. The modules beside it are found from now on, as they are by Python,
    but behind all others: nothing of them is imported into this process."""
    folder = str(Path(file).absolute().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    return imports_of_source(source)


def start_script(request: Request, file: str, source: bytes, arguments: list[str]) -> int:
    """Run a script on a machine and leave it there."""
    script = functools.partial(run_detached, file, str(Path(file).absolute()), source, arguments)
    code = f"script({', '.join(map(repr, [file, *arguments]))})"
    namespace = {"script": script}
    session = Session(namespace=namespace, request=request, notebook=file)
    session.need(imports_of_script(file, source))
    handle = session.start(code, cell_names(code, namespace, code), count=0, label=request.name)
    assert session.machine is not None
    print(f"{file} runs on {session.machine.name} as {handle.name}.")
    print(f"Show its output: mlinfra attach {handle.name}")
    return 0


class Terminal(Console):
    """Everything that a run publishes, as text; errors with their traceback."""

    def __init__(self) -> None:
        super().__init__(show_result=True)
        self.status = 0
        """The exit status that a script has ended with."""

    def publish(self, record: Record) -> None:
        """As :class:`Console`, and errors."""
        if record.msg_type == "error":
            self._error(json.loads(record.content))
        else:
            super().publish(record)

    def _error(self, content: dict[str, Any]) -> None:
        if content["ename"] == ScriptFailed.__name__:  # the script has printed its own error
            self.status = int(content["evalue"])
            return
        self.status = 1
        text = "\n".join(content["traceback"])
        print(text if sys.stderr.isatty() else _COLOR.sub("", text), file=sys.stderr, flush=True)


def _everywhere() -> list[tuple[Session, RunInfo]]:
    request = spec.resolve(spec.configured()).request

    def session_on(machine: Machine) -> Session:
        return Session(namespace={}, request=directory.request_for(machine, request))

    return list(directory.runs_everywhere(session_on, say))


def _name(info: RunInfo) -> str:
    return info.label or info.run


def _now(session: Session, info: RunInfo) -> RunInfo | None:
    """The run as it is by now; None once it has been collected."""
    return next((it for it in session.runs() if it.run == info.run), None)


def _attach(session: Session, info: RunInfo) -> int:
    name, terminal = _name(info), Terminal()
    try:
        session.watch(info.run, terminal.publish, until_end=True)
    except KeyboardInterrupt:
        say(
            f"{name} goes on. Show it again: mlinfra attach {name}; "
            f"interrupt it: mlinfra cancel {name}"
        )
        raise
    ended = _now(session, info)
    if ended is None:
        say(f"{name} has ended and was collected by a notebook.")
    else:
        say(
            f"{name} has ended: {ended.status}. Its output and variables are kept: "
            f"`%remote attach {name}` brings them into a notebook, "
            f"`mlinfra cancel {name}` discards them."
        )
    return terminal.status


def _wait(session: Session, info: RunInfo) -> int:
    now: RunInfo | None = info
    while now is not None and not now.ended:
        time.sleep(_POLL)
        now = _now(session, info)
    if now is None:
        print(f"{_name(info)} was collected by a notebook.")
        return 0
    print(f"{_name(info)} has ended: {now.status}.")
    return 0 if now.status == "done" else 1


def _runs(as_json: bool) -> int:
    found = _everywhere()
    if as_json:
        rows = [_as_json(session, info) for session, info in found]
        print_json(rows)
    elif not found:
        print("No run goes on, and none waits to be collected.")
    else:
        _show(found)
    return 0


def _as_json(session: Session, info: RunInfo) -> dict[str, Any]:
    return {
        "name": _name(info),
        "id": info.run,
        "machine": session.machine.name if session.machine else "",
        "status": info.status,
        "started_at": info.started,
        "ended_at": info.ended or None,
        "messages": info.messages,
        "followed": info.followed,
        "progress": None
        if (loop := info.progress) is None
        else {"done": loop.done, "total": loop.total or None, "unit": loop.unit, "left": loop.left},
        "notebook": info.notebook,
        "title": info.title,
    }


def _show(found: list[tuple[Session, RunInfo]]) -> None:
    from rich.table import Table

    heads = ("run", "id", "on", "state", "time", "progress", "from", "code")
    table = Table(*heads, box=None, pad_edge=False)
    for session, info in found:
        table.add_row(
            info.label or "-",
            info.run,
            session.machine.name if session.machine else "",
            info.status,
            format_duration((info.ended or time.time()) - info.started),
            str(info.progress or "-"),
            Path(info.notebook).name or "-",
            info.title,
        )
    console().print(table)
