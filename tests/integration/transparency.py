"""Runs notebooks locally and with cells on a machine, and compares what a front end sees.

The notebooks are in tests/notebooks/transparency: ``.ipy`` files with cells that begin with
``# %%``; ``# %% raises`` marks a cell that raises. What is compared, per cell: every message that
a front end shows, in order (adjacent chunks of one stream are one), the execution count, and at
the end the state of all widgets that are on display. The run card is not part of it.

``python transparency.py [NAME ...]`` prints what differs; ``python -m benchmarks transparency``
records the shares of equal cells beside those of ipyparallel's ``%%px``.
"""

from __future__ import annotations

import copy
import os
import queue
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = Path(__file__).parents[1] / "notebooks" / "transparency"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipy"))

# Which cells run on the machine, by their index.
WAYS = {
    "local": lambda index: False,
    "remote": lambda index: True,
    "alternating": lambda index: index % 2 == 1,
    "alternating from remote": lambda index: index % 2 == 0,
}


@dataclass(frozen=True)
class Tool:
    """What sends a cell to another kernel: its magic, and the cells before and after all others."""

    magic: str
    begin: str
    end: str


MLINFRA = Tool("%%remote", "%load_ext jupyter_mlinfra", "%remote stop")

Event = dict[str, Any]


@dataclass
class Run:
    """What the front end saw: the events of each cell, and widget models by their id."""

    sources: list[str] = field(default_factory=list)
    cells: list[list[Event]] = field(default_factory=list)
    widgets: dict[str, Any] = field(default_factory=dict)


def cells_of(name: str) -> list[str]:
    text = (NOTEBOOKS / f"{name}.ipy").read_text("utf-8")
    return [
        part.partition("\n")[2].strip("\n") for part in re.split(r"^# %%", text, flags=re.M)[1:]
    ]


class _Client(NotebookClient):
    """A client that also notes every message that a front end would show."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.events: list[list[Event]] = []

    async def async_start_new_kernel_client(self) -> Any:
        """Replies are looked for each second: jupyter_client sends what widgets say past pyzmq's
        asyncio socket, which then may not hear of the reply that it waits for (pyzmq 27.3)."""
        client: Any = await super().async_start_new_kernel_client()
        channel = client.shell_channel
        get_msg = channel.get_msg

        async def patient(timeout: float = float("inf")) -> Any:
            end = time.monotonic() + timeout
            while True:
                try:
                    return await get_msg(timeout=min(1.0, max(0.0, end - time.monotonic())))
                except queue.Empty:
                    if time.monotonic() >= end:
                        raise

        channel.get_msg = patient
        return client

    def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
        kind, content = msg["msg_type"], msg["content"]
        while len(self.events) <= cell_index:
            self.events.append([])
        events = self.events[cell_index]
        if kind == "execute_input":
            events.append({"type": kind, "execution_count": content["execution_count"]})
        elif kind == "stream":
            _add_stream(events, content["name"], content["text"])
        elif kind in _SHOWN and not content.get("metadata", {}).get("mlinfra", {}).get("card"):
            events.append({"type": kind, **copy.deepcopy(content)})
        return super().process_message(msg, cell, cell_index)


_SHOWN = {"display_data", "update_display_data", "execute_result", "error", "clear_output"}


def _add_stream(events: list[Event], name: str, text: str) -> None:
    if events and events[-1]["type"] == "stream" and events[-1]["name"] == name:
        events[-1]["text"] += text
    elif text:
        events.append({"type": "stream", "name": name, "text": text})


async def run(name: str, way: str, directory: Path, tool: Tool = MLINFRA) -> Run:
    """Execute the notebook in an empty directory with a home of its own."""
    sources = cells_of(name)
    notebook = nbformat.v4.new_notebook()
    first = tool.begin if way != "local" else "pass"
    notebook.cells.append(nbformat.v4.new_code_cell(first))
    for index, source in enumerate(sources):
        # The first line keeps the line numbers equal; a cell magic must be the first line.
        local = "" if source.startswith("%%") else f"#{tool.magic}\n"
        prefix = f"{tool.magic}\n" if WAYS[way](index) else local
        notebook.cells.append(nbformat.v4.new_code_cell(prefix + source))
    notebook.cells.append(nbformat.v4.new_code_cell(tool.end if way != "local" else "pass"))
    work = directory / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    environment = dict(os.environ, MLINFRA_HOME=str(directory / "home"), PYTHONHASHSEED="0")
    # Tests of the source tree: both packages as they are here.
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = os.pathsep.join((str(root), str(root / "sdk")))
    client = _Client(
        notebook,
        timeout=200,
        kernel_name="python3",
        allow_errors=True,
        store_widget_state=True,
        resources={"metadata": {"path": str(work)}},
    )
    await client.async_execute(env=environment)
    failed = [event for event in client.events[0] if event["type"] == "error"]
    if failed:
        raise RuntimeError(f"{first}: {failed[0]['ename']}: {failed[0]['evalue']}")
    widgets = notebook.metadata.get("widgets", {}).get(_WIDGET_STATE, {}).get("state", {})
    events = client.events[1 : len(sources) + 1]
    return Run(sources, [_normal(cell) for cell in events], widgets)


_WIDGET_STATE = "application/vnd.jupyter.widget-state+json"

# Measured times and what counts anew in every process.
_UNSTABLE = [
    (re.compile(r"^(CPU times|Wall time): .*$", re.M), r"\1"),
    (re.compile(r"^The slowest run took .*\n", re.M), ""),
    (re.compile(r"^.* per loop \(.*$", re.M), "per loop"),
    (re.compile(r"0x[0-9a-f]{6,}"), "0x"),
    (re.compile(r"(ipykernel_\d+/)?\b\d{6,}\.py"), "cell.py"),
]


def _normal(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_normal(item) for item in value]
    if isinstance(value, str):
        for pattern, replacement in _UNSTABLE:
            value = pattern.sub(replacement, value)
    return value


class _Models:
    """Names widget models by the order in which they are reached, and keeps their states."""

    def __init__(self, widgets: dict[str, Any]) -> None:
        self._widgets = widgets
        self._names: dict[str, str] = {}
        self.states: list[Any] = []

    def _name(self, model: str) -> str:
        if model not in self._names:
            self._names[model] = f"model {len(self._names)}"
            place = len(self.states)
            self.states.append(None)
            self.states[place] = self.named(self._widgets.get(model))
        return self._names[model]

    def named(self, value: Any) -> Any:
        """The value with the ids of models replaced."""
        if isinstance(value, dict):
            return {
                key: self._name(item) if key == "model_id" else self.named(item)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self.named(item) for item in value]
        if isinstance(value, str):
            if value in self._widgets or value.startswith("IPY_MODEL_"):
                return self._name(value.removeprefix("IPY_MODEL_"))
            return re.sub(r"model_id=[0-9a-f]{32}", "model_id=", value)
        return value


class _DisplayIds:
    """Names display ids that were drawn at random."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def named(self, event: Event) -> Event:
        display_id = event.get("transient", {}).get("display_id")
        if display_id is None:
            return event
        if re.fullmatch(r"[0-9a-f]{32}", display_id):
            display_id = self._names.setdefault(display_id, f"display {len(self._names)}")
        return {**event, "transient": {"display_id": display_id}}


def compare(expected: Run, found: Run) -> list[str | None]:
    """For every cell what differs, or None. The widgets on display belong to their cell."""
    ids, other_ids = _DisplayIds(), _DisplayIds()
    verdicts: list[str | None] = []
    for index, source in enumerate(expected.sources):
        wanted, seen = _shown(expected, index, ids), _shown(found, index, other_ids)
        if wanted == seen:
            verdicts.append(None)
        else:
            verdicts.append(f"cell {index}:\n{_indented(source)}\n{_difference(wanted, seen)}")
    return verdicts


def _shown(result: Run, index: int, ids: _DisplayIds) -> list[Any]:
    """The events of a cell and the states of the widgets in them."""
    models = _Models(result.widgets)
    cell = result.cells[index] if index < len(result.cells) else []
    events = [models.named(ids.named(event)) for event in cell]
    return events + models.states


def _difference(wanted: list[Any], seen: list[Any]) -> str:
    for index in range(max(len(wanted), len(seen))):
        a = wanted[index] if index < len(wanted) else "nothing"
        b = seen[index] if index < len(seen) else "nothing"
        if a != b:
            return f"  output {index}\n    expected {_short(a, b)}\n    found    {_short(b, a)}"
    return ""


def _short(value: Any, other: Any) -> str:
    """The text of the value around the place where it begins to differ."""
    text, other_text = repr(value), repr(other)
    pairs = enumerate(zip(text, other_text, strict=False))
    place = next((index for index, (a, b) in pairs if a != b), 0)
    start = max(0, place - 120)
    return ("..." if start else "") + text[start : place + 240]


def _indented(source: str) -> str:
    lines = source.splitlines()
    return "\n".join(f"    | {line}" for line in lines[:6] + ["..."] * (len(lines) > 6))


Verdicts = dict[str, list[str | None]]


async def verdicts(
    name: str, directory: Path, tool: Tool = MLINFRA, ways: Collection[str] = tuple(WAYS)
) -> Verdicts:
    """What differs from a local run, by way. All runs of the notebook go side by side."""
    runs: dict[str, Run | str] = {}

    async def one(way: str) -> None:
        try:
            runs[way] = await run(name, way, directory / way, tool)
        except (CellExecutionError, RuntimeError) as error:
            runs[way] = f"the run ended early: {error}"

    async with anyio.create_task_group() as group:
        for way in {"local", *ways}:
            group.start_soon(one, way)
    expected = runs.pop("local")
    assert isinstance(expected, Run), expected
    return {
        way: compare(expected, found) if isinstance(found, Run) else [found] * len(expected.sources)
        for way, found in runs.items()
    }


class Shares:
    """How many cells were equal, by way."""

    def __init__(self) -> None:
        self.equal = dict.fromkeys(list(WAYS)[1:], 0)
        self.total = dict.fromkeys(list(WAYS)[1:], 0)

    def add(self, found: Verdicts) -> None:
        """Count a notebook."""
        for way, cells in found.items():
            self.equal[way] += cells.count(None)
            self.total[way] += len(cells)

    def percent(self, way: str) -> float:
        """The share of equal cells."""
        return 100 * self.equal[way] / max(self.total[way], 1)

    def __str__(self) -> str:
        return "\n".join(
            f"{way}: {self.equal[way]} of {total} cells equal, {self.percent(way):.1f} %"
            for way, total in self.total.items()
        )


def described(name: str, found: Verdicts) -> str:
    """How much of a notebook was equal, and what was not."""
    lines = []
    for way, cells in found.items():
        wrong = list(dict.fromkeys(filter(None, cells)))
        lines += [f"{name}, {way}: {cells.count(None)} of {len(cells)} cells equal", *wrong]
    return "\n".join(lines)


def main(names: list[str]) -> None:
    """Print what differs in the named notebooks (all by default), and the shares."""
    shares = Shares()
    for name in names or NAMES:
        with tempfile.TemporaryDirectory() as directory:
            found = anyio.run(verdicts, name, Path(directory))
        print(described(name, found), flush=True)
        shares.add(found)
    print(shares)


if __name__ == "__main__":
    main(sys.argv[1:])
