"""What a remote kernel publishes, republished by this kernel under the cell that caused it."""

from __future__ import annotations

import json
import sys
import time
import uuid
from typing import Any

import msgspec

from mlinfra_sdk.frontend import ASK, is_yes
from mlinfra_sdk.machines.ends import notice
from mlinfra_sdk.machines.lifecycle import LiveMachine
from mlinfra_sdk.worker.records import CHECKPOINT, ENDING, METRICS, USAGE, WANTED, Record
from mlinfra_sdk.worker.run_usage import Reading, RunUsage
from mlinfra_sdk.worker.watchdog import End

from .cards import RunState, message
from .comms import RemoteComms

_REDRAW_S = 0.5
"""Seconds between two drawings of a card whose progress goes on."""


class KernelFrontend:
    """The front end of one cell or comm message: this kernel's own, by the parent header."""

    def __init__(self, kernel: Any, comms: RemoteComms, card: RunState | None = None) -> None:
        self._kernel = kernel
        self._comms = comms
        self._parent = kernel.get_parent("shell")
        self._card = card
        self._card_id = ""
        self._shown = 0.0
        self.allow_stdin = bool(kernel._allow_stdin)

    def publish(self, record: Record) -> None:
        """Send a Jupyter message on; the card goes first."""
        if not self._card_id:
            self.show()
        if record.msg_type == ENDING:
            self.note(notice(msgspec.json.decode(record.content, type=End)))
            return
        if record.msg_type in (METRICS, USAGE):
            self._measured(record)
            return
        if record.msg_type in (CHECKPOINT, WANTED):  # of a run that is only watched
            return
        content: Any = record.content  # JSON already: passed on as it is
        if record.msg_type.startswith("comm_"):
            content = json.loads(content)
            self._capture_here(content, record.parent)
            self._comms.published(record.msg_type, content, record.buffers)
        self.send(record.msg_type, content, json.loads(record.metadata), record.buffers)

    def _measured(self, record: Record) -> None:
        """Tell on the card what the run does, with its next drawing."""
        if self._card is None:
            return
        if record.msg_type == METRICS:
            self._card.heard(msgspec.json.decode(record.content, type=Reading))
        else:
            self._card.usage = msgspec.json.decode(record.content, type=RunUsage)
        self._redraw_in_background()

    def _redraw_in_background(self) -> None:
        """Nobody waits for such a run and redraws its card meanwhile."""
        if self._card is not None and self._card.background and self._card_id:
            self.show()

    def _capture_here(self, content: dict[str, Any], run: str) -> None:
        """An Output widget names the message whose outputs it takes: over there, the run."""
        state = content.get("data", {}).get("state")
        if isinstance(state, dict) and state.get("msg_id") == run:
            state["msg_id"] = self._parent["header"]["msg_id"]

    def send(
        self,
        msg_type: str,
        content: dict[str, Any] | bytes,
        metadata: dict[str, Any] | None = None,
        buffers: list[bytes] | None = None,
    ) -> None:
        """One message to the front end, under this cell."""
        self._kernel.session.send(
            self._kernel.iopub_socket,
            msg_type,
            content,
            metadata=metadata,
            parent=self._parent,
            ident=self._kernel._topic(msg_type),
            buffers=buffers or None,
        )

    def ask(self, prompt: str, password: bool) -> str:
        """As ``input`` and ``getpass`` of this kernel."""
        answer: str = self._kernel.getpass(prompt) if password else self._kernel.raw_input(prompt)
        return answer

    def confirm(self, question: str) -> bool | None:
        """On the card, which offers buttons where the front end can draw them: they answer the
        same line of input that everybody else types into."""
        if not self.allow_stdin:
            return None
        card, note = self._card, ""
        if card is not None:
            note, card.note = card.note, question
            card.enter("confirm")
            self.show()
        else:
            self.note(question)
        try:
            return is_yes(self.ask(ASK, password=False))
        finally:
            if card is not None:
                card.note = note
                card.enter("start")
                self.show()

    def begun(self, run: str) -> None:
        """Keep it on the card, which outlives this kernel."""
        if self._card is not None:
            self._card.run = run

    def phase(self, phase: Any) -> None:
        """Tell it on the card; a start takes long enough to be shown at once."""
        if self._card is not None:
            if self._card.phase != phase:
                self._card.enter(phase)
            if self._card_id or phase != "running":
                self.show()

    def placed(self, machine: LiveMachine) -> None:
        """Tell it on the card."""
        if self._card is not None:
            offer = machine.offer
            self._card.machine, self._card.target = machine.name, machine.target
            self._card.gpu = str(offer.gpu or "")
            self._card.rate = offer.price.micro_per_hour if offer.price.known else None

    def detail(self, text: str) -> None:
        """Tell it on the card."""
        if self._card is not None:
            self._card.detail = text
            self.show()

    def progress(self, done: int, total: int) -> None:
        """Tell it on the card, now and then."""
        if self._card is not None:
            self._card.progress = done, total
            if time.monotonic() - self._shown > _REDRAW_S:
                self.show()

    def moved(self, sent: list[str], received: list[str], up: int, down: int) -> None:
        """Tell it on the card."""
        if self._card is not None:
            self._card.sent, self._card.received = sent, received
            self._card.bytes_up, self._card.bytes_down = up, down

    def safe(self, name: str, step: int, at: float) -> None:
        """Tell it on the card, with its next drawing."""
        if self._card is not None:
            self._card.safe = name, step, at
            self._redraw_in_background()

    def tick(self) -> None:
        """Redraw the card."""
        self.show()

    def note(self, text: str) -> None:
        """A sentence on the card, or on stderr without one."""
        if self._card is None:
            self.send("stream", {"name": "stderr", "text": text + "\n"})
        else:
            self._card.note = text
            self.show()

    def show(self) -> None:
        """Draw the card, above all outputs of the cell."""
        if self._card is None:
            return
        msg_type = "update_display_data" if self._card_id else "display_data"
        if not self._card_id:
            for stream in (sys.stdout, sys.stderr):
                if getattr(stream, "_buffers", True):  # ipykernel's flush is slow even if empty
                    stream.flush()
            self._card_id = uuid.uuid4().hex
        self.send(msg_type, message(self._card, self._card_id))
        self._shown = time.monotonic()
