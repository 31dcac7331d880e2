"""Runs that can be checked to the last message, and a client in this process that records them."""

from __future__ import annotations

import base64
import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from mlinfra_sdk.machines.lifecycle import LiveMachine
from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.running import Result
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request
from mlinfra_sdk.worker.records import METRICS, USAGE, Record


class Recorder:
    """A front end that keeps everything."""

    allow_stdin = False

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.phases: list[str] = []
        self.notes: list[str] = []
        self.details: list[str] = []
        self.progressed: list[tuple[int, int]] = []
        self.steps: list[int] = []
        """Those whose checkpoints were safe."""
        self.run = ""

    def publish(self, record: Record) -> None:
        self.records.append(record)

    def ask(self, prompt: str, password: bool) -> str:
        raise AssertionError("nobody may be asked")

    def begun(self, run: str) -> None:
        self.run = run

    def phase(self, phase: str) -> None:
        self.phases.append(phase)

    def placed(self, machine: LiveMachine) -> None:
        self.placement = machine.offer

    def detail(self, text: str) -> None:
        self.details.append(text)

    def progress(self, done: int, total: int) -> None:
        self.progressed.append((done, total))

    def moved(self, sent: list[str], received: list[str], up: int, down: int) -> None:
        pass

    def safe(self, name: str, step: int, at: float) -> None:
        self.steps.append(step)

    def tick(self) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def text(self) -> str:
        return "".join(
            json.loads(record.content)["text"]
            for record in self.records
            if record.msg_type == "stream"
        )


@dataclass
class Work:
    """A cell that prints ``lines`` numbered lines, with pictures, updates of a display and comm
    messages between them, and changes variables."""

    lines: int
    pause: float = 0.0
    """Seconds after each hundred lines."""
    name: str = "work"
    extra: str = ""

    @property
    def code(self) -> str:
        return (
            textwrap.dedent(
                f"""
            import base64 as _base64, comm as _comm, time as _time
            from IPython.display import display
            _bar = display({{"text/plain": "{self.name} bar"}}, raw=True, display_id=True)
            _channel = _comm.create_comm(target_name="test", data={{"name": {self.name!r}}})
            {self.name}_total = 0
            for _n in range({self.lines}):
                print("{self.name}", _n)
                {self.name}_total += _n
                if _n % 100 == 0:
                    _bar.update({{"text/plain": f"{self.name} bar {{_n}}"}}, raw=True)
                    _picture = _base64.b64encode(bytes([_n % 251]) * 1500).decode()
                    _text = f"{self.name} display {{_n}}"
                    display({{"text/plain": _text, "image/png": _picture}}, raw=True)
                    _channel.send({{"n": _n}}, buffers=[bytes([_n % 256]) * 3000])
                    _time.sleep({self.pause})
            """
            )
            + self.extra
        )

    @property
    def total(self) -> int:
        return self.lines * (self.lines - 1) // 2

    def problems(self, records: list[Record]) -> list[str]:
        """What is lost, doubled, out of order or corrupted in what a front end was given."""
        found = []
        records = [record for record in records if record.msg_type != METRICS]  # news, not kept
        numbers = [record.number for record in records]
        expected = list(range(1, len(numbers) + 1))
        if numbers != expected:
            at = next(i for i, (a, b) in enumerate(zip(numbers, expected, strict=True)) if a != b)
            found.append(f"message {expected[at]} is {numbers[at]}")
        shown, pictures, sent, opened = "", [], [], 0
        for record in records:
            content = json.loads(record.content)
            if record.msg_type == "stream":
                shown += content["text"]
            elif record.msg_type in ("display_data", "update_display_data"):
                shown += content["data"].pop("text/plain") + "\n"
                pictures += content["data"].values()
            elif record.msg_type == "comm_open":
                opened += 1
            elif record.msg_type == "comm_msg":
                sent.append((content["data"]["n"], *map(bytes, record.buffers)))
            elif record.msg_type != USAGE:
                found.append(f"a {record.msg_type}")
        wanted = f"{self.name} bar\n" + "".join(
            f"{self.name} {n}\n"
            + (f"{self.name} bar {n}\n{self.name} display {n}\n" if n % 100 == 0 else "")
            for n in range(self.lines)
        )
        if shown != wanted:
            found.append(f"text differs: {len(shown)} characters of {len(wanted)}")
        if pictures != [_picture(n) for n in range(0, self.lines, 100)]:
            found.append(f"{len(pictures)} pictures, or they differ")
        if sent != [(n, bytes([n % 256]) * 3000) for n in range(0, self.lines, 100)]:
            found.append(f"comm messages differ: {[n for n, *_ in sent][:50]}")
        if opened != 1:
            found.append(f"{opened} comms opened")
        return found


def _picture(n: int) -> str:
    return base64.b64encode(bytes([n % 251]) * 1500).decode()


@dataclass
class Client:
    """A notebook's client in this process."""

    request: Request
    namespace: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The folder of these tests is the repository.
        request = msgspec.structs.replace(self.request, sync=False)
        self.session = Session(namespace=self.namespace, request=request)

    def run(self, code: str, recorder: Recorder | None = None) -> Result:
        names = cell_names(code, self.namespace, code)
        return self.session.execute(code, names, frontend=recorder or Recorder(), count=1)

    def start(self, code: str, **options: Any) -> Any:
        names = cell_names(code, self.namespace, code)
        return self.session.start(code, names, count=1, **options)


@contextmanager
def apart(folder: Path) -> Iterator[Path]:
    """A state directory of its own, and another folder to work in, both below this one; nothing may
    run there afterwards."""
    (folder / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLINFRA_HOME", str(folder / "home"))
        patch.chdir(folder / "work")
        yield folder / "home"
    assert not processes(folder / "home")


@contextmanager
def client(**settings: Any) -> Iterator[Client]:
    """A client; its machine is stopped in the end."""
    it = Client(Request(**({"env": "none"} | settings)))
    try:
        yield it
    finally:
        it.session.stop()


def processes(home: Path) -> list[psutil.Process]:
    """Agents of this state directory, and all that they started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and (
                process.environ().get("MLINFRA_HOME") == str(home)
                and process.pid != psutil.Process().pid
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


def agents(home: Path) -> list[psutil.Process]:
    return [it for it in processes(home) if "mlinfra_sdk.worker" in it.cmdline()]


def kernels(home: Path) -> list[psutil.Process]:
    return [it for it in processes(home) if "mlinfra_sdk.worker.kernel" in it.cmdline()]
