"""Where the outputs of a run appear: what a session needs of a front end, and a console one."""

from __future__ import annotations

import getpass
import json
import queue
import shutil
import sys
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from mlinfra_sdk.machines.ends import notice
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.providers.waiting import listening
from mlinfra_sdk.worker.records import ENDING, Record
from mlinfra_sdk.worker.watchdog import End

if TYPE_CHECKING:
    from mlinfra_sdk.machines.lifecycle import LiveMachine

T = TypeVar("T")


ASK = "Start it? [y/N] "


def is_yes(answer: str) -> bool:
    """Whether what was typed means yes."""
    return answer.strip().lower() in ("y", "yes")


class Frontend(Protocol):
    """Shows what a run publishes. ``publish`` may be called from any thread, one at a time."""

    allow_stdin: bool

    def publish(self, record: Record) -> None:
        """Show one Jupyter message."""
        ...

    def ask(self, prompt: str, password: bool) -> str:
        """Have the user type something."""
        ...

    def confirm(self, question: str) -> bool | None:
        """Whether the user wants that; None if nobody can be asked."""
        ...

    def begun(self, run: str) -> None:
        """By this name the run can be attached, should this process end before it."""
        ...

    def phase(self, phase: str) -> None:
        """The run has come to another phase: start, environment, data, running."""
        ...

    def detail(self, text: str) -> None:
        """What the present phase is at, in a few words."""
        ...

    def placed(self, machine: LiveMachine) -> None:
        """The machine that has been found or started, as it really is."""
        ...

    def progress(self, done: int, total: int) -> None:
        """How many bytes of the present phase are done; may be called as often as one likes."""
        ...

    def moved(self, sent: list[str], received: list[str], up: int, down: int) -> None:
        """Which variables moved, and how many bytes over the link."""
        ...

    def safe(self, name: str, step: int, at: float) -> None:
        """A checkpoint has come here, or has been made here, at this time (Unix seconds). Called
        in another thread than the caller's."""
        ...

    def tick(self) -> None:
        """Called about once a second while a run goes on."""
        ...

    def note(self, text: str) -> None:
        """A sentence about the run that the user should see."""
        ...


class Console:
    """Outputs on this process's stdout and stderr, as a script has them."""

    allow_stdin = True

    def __init__(self, show_result: bool = False) -> None:
        self._show_result = show_result
        self._passing = False
        """Whether a line stands in the terminal that goes with the next output."""

    def publish(self, record: Record) -> None:
        """Streams as they are, displays as their text."""
        self.detail("")
        content: dict[str, Any] = json.loads(record.content)
        if record.msg_type == "stream":
            stream = sys.stderr if content["name"] == "stderr" else sys.stdout
            stream.write(content["text"])
            stream.flush()
        elif record.msg_type == ENDING:
            self.note(notice(msgspec.convert(content, End)))
        elif record.msg_type == "display_data" or (
            record.msg_type == "execute_result" and self._show_result
        ):
            text = content["data"].get("text/plain")
            if text:
                print(text, flush=True)

    def ask(self, prompt: str, password: bool) -> str:
        """From this process's terminal; the end of stdin is Ctrl-D, as Jupyter writes it."""
        self.detail("")
        try:
            return getpass.getpass(prompt) if password else input(prompt)
        except EOFError:
            return "\x04"

    def confirm(self, question: str) -> bool | None:
        """At a terminal."""
        if not self.allow_stdin or sys.stdin is None or not sys.stdin.isatty():
            return None
        print(question, file=sys.stderr, flush=True)
        return is_yes(self.ask(ASK, password=False))

    def begun(self, run: str) -> None:
        """Not shown."""

    def phase(self, phase: str) -> None:
        """Not shown."""

    def placed(self, machine: LiveMachine) -> None:
        """Not shown."""

    def detail(self, text: str) -> None:
        """In a terminal, on a line that the next output replaces."""
        if self._passing or (text and sys.stderr.isatty()):
            shown = text[: shutil.get_terminal_size().columns - 1]
            sys.stderr.write(f"\r\x1b[2K{shown}")
            sys.stderr.flush()
            self._passing = bool(text)

    def progress(self, done: int, total: int) -> None:
        """Not shown."""

    def moved(self, sent: list[str], received: list[str], up: int, down: int) -> None:
        """Not shown."""

    def safe(self, name: str, step: int, at: float) -> None:
        """Not shown."""

    def tick(self) -> None:
        """Not shown."""

    def note(self, text: str) -> None:
        """On stderr."""
        self.detail("")
        print(text, file=sys.stderr, flush=True)


def shown_while_waiting(coroutine: Coroutine[Any, Any, T], frontend: Frontend) -> T:
    """Run a coroutine in the background and show what it tells to wait for
    (``providers/waiting.py``), in this thread. An interrupt cancels it."""
    news: queue.SimpleQueue[str] = queue.SimpleQueue()
    shown, drawn = "", time.monotonic()

    def show() -> None:
        nonlocal shown, drawn
        latest = shown
        while not news.empty():
            latest = news.get()
        if latest != shown:
            frontend.detail(latest)
        elif time.monotonic() - drawn > 1:
            frontend.tick()
        else:
            return
        shown, drawn = latest, time.monotonic()

    with listening(news.put):
        try:
            return portal().call(coroutine, meanwhile=show)
        finally:
            if shown:
                frontend.detail("")
