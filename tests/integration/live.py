"""A notebook as a front end sees it: a real kernel, every message that it sends, its processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import zmq
from jupyter_client.manager import KernelManager
from processes import PATIENCE, until

from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines import lifecycle
from mlinfra_sdk.machines.portal import portal

ROOT = Path(__file__).parents[2]
"""Seconds until something that must happen counts as not happening."""

Message = dict[str, Any]


class Cell:
    """One execute request and all that came of it."""

    def __init__(self, answers: Sequence[str] = ()) -> None:
        self.everything: list[Message] = []
        self.prompts: list[Message] = []
        self.reply: Message = {}
        self.idle = False
        self.answers = list(answers)

    @property
    def done(self) -> bool:
        return self.idle and bool(self.reply)

    @property
    def cards(self) -> list[Message]:
        """Drawings of the run card, oldest first."""
        return [message for message in self.everything if _is_card(message)]

    @property
    def outputs(self) -> list[Message]:
        """What the cell itself shows."""
        return [
            message
            for message in self.everything
            if message["msg_type"] not in ("status", "execute_input") and not _is_card(message)
        ]

    def of(self, *kinds: str) -> list[Message]:
        return [message for message in self.outputs if message["msg_type"] in kinds]

    @property
    def kinds(self) -> list[str]:
        """Types of the outputs; adjacent pieces of one stream count once, as ``stdout``."""
        found: list[str] = []
        for message in self.outputs:
            kind = message["msg_type"]
            if kind == "stream":
                kind = message["content"]["name"]
                if found and found[-1] == kind:
                    continue
            found.append(kind)
        return found

    def stream(self, name: str) -> str:
        return "".join(
            message["content"]["text"]
            for message in self.of("stream")
            if message["content"]["name"] == name
        )

    @property
    def stdout(self) -> str:
        return self.stream("stdout")

    @property
    def stderr(self) -> str:
        return self.stream("stderr")

    @property
    def data(self) -> list[dict[str, Any]]:
        """The mime bundles of displays and results."""
        return [
            message["content"]["data"]
            for message in self.of("display_data", "update_display_data", "execute_result")
        ]

    @property
    def result(self) -> str:
        """The text of the one execute_result."""
        (message,) = self.of("execute_result")
        return str(message["content"]["data"]["text/plain"])

    @property
    def error(self) -> tuple[str, str]:
        """Name and text of the one error, which reply and iopub must agree on."""
        (message,) = self.of("error")
        content = message["content"]
        assert self.reply["status"] == "error"
        assert (self.reply["ename"], self.reply["evalue"]) == (content["ename"], content["evalue"])
        return content["ename"], content["evalue"]

    @property
    def traceback(self) -> str:
        (message,) = self.of("error")
        return "\n".join(message["content"]["traceback"])


def _is_card(message: Message) -> bool:
    metadata = message["content"].get("metadata", {})
    return bool(isinstance(metadata, dict) and metadata.get("mlinfra", {}).get("card"))


class Notebook:
    """One local kernel with the extension loaded, in a directory and a state directory."""

    def __init__(self, folder: Path, *, home: Path | None = None, **environment: str) -> None:
        self.folder = folder
        self.home = home or folder / "home"
        self.work = folder / "work"
        self.temporary = folder / "tmp"
        for path in (folder, self.work, self.temporary):
            path.mkdir(exist_ok=True)
        self.environment = dict(
            os.environ,
            MLINFRA_HOME=str(self.home),
            MLINFRA_TEST=str(folder),
            TMPDIR=str(self.temporary),
            XDG_CONFIG_HOME=str(folder / "config"),
            IPYTHONDIR=str(folder / "ipython"),
            PYTHONPATH=os.pathsep.join(
                filter(None, (str(ROOT), str(ROOT / "sdk"), os.environ.get("PYTHONPATH")))
            ),
            **environment,
        )
        # With it ipykernel would not capture what is written below Python.
        self.environment.pop("PYTEST_CURRENT_TEST", None)
        self._manager = KernelManager(kernel_name="python3")
        self._cells: dict[str, Cell] = {}
        self._loose: list[Message] = []
        self._start()
        self.run("%load_ext jupyter_mlinfra")

    def _start(self) -> None:
        self._manager.start_kernel(env=self.environment, cwd=str(self.work))
        self._connect()

    def _connect(self) -> None:
        self._client = self._manager.blocking_client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=PATIENCE)
        self._poller = zmq.Poller()
        channels = (self._client.iopub_channel, self._client.shell_channel)
        for channel in (*channels, self._client.stdin_channel):
            self._poller.register(channel.socket, zmq.POLLIN)

    # -- cells -------------------------------------------------------------------------------

    def start(self, code: str, answers: Sequence[str] = (), **options: Any) -> Cell:
        """Send a cell and do not wait for it."""
        cell = Cell(answers)
        self._cells[self._client.execute(code, **options)] = cell
        return cell

    def run(self, code: str, answers: Sequence[str] = (), **options: Any) -> Cell:
        """Run a cell that must succeed."""
        cell = self.finish(self.start(code, answers, **options))
        assert cell.reply["status"] == "ok", cell.reply.get("traceback") or cell.reply
        return cell

    def fail(self, code: str, answers: Sequence[str] = (), **options: Any) -> Cell:
        """Run a cell that must raise."""
        cell = self.finish(self.start(code, answers, **options))
        assert cell.reply["status"] == "error", cell.outputs
        return cell

    def remote(self, code: str, answers: Sequence[str] = (), **options: Any) -> Cell:
        """Run a remote cell that must succeed."""
        return self.run("%%remote\n" + code, answers, **options)

    def evaluate(self, expression: str) -> str:
        """The repr of a local expression."""
        return self.run(f"print(repr({expression}), end='')").stdout

    def finish(self, cell: Cell) -> Cell:
        self.wait(lambda: cell.done)
        return cell

    def interrupt(self) -> None:
        self._manager.interrupt_kernel()

    def comm(self, msg_type: str, content: dict[str, Any], buffers: list[bytes]) -> Cell:
        """Send a comm message; what it causes is gathered like a cell's outputs."""
        message = self._client.session.msg(msg_type, content)
        self._client.session.send(self._client.shell_channel.socket, message, buffers=buffers)
        cell = self._cells[message["header"]["msg_id"]] = Cell()
        return cell

    def ask(self, message_id: str) -> Cell:
        """Gather the reply to another request."""
        cell = self._cells[message_id] = Cell()
        return self.finish(cell)

    def complete(self, code: str) -> list[str]:
        matches: list[str] = self.ask(self._client.complete(code)).reply["matches"]
        return matches

    # -- messages ----------------------------------------------------------------------------

    def wait(self, condition: Callable[[], object], patience: float = PATIENCE) -> None:
        """Take messages until the condition holds."""
        end = time.monotonic() + patience
        while not condition():
            if time.monotonic() > end:
                seen = [(cell.everything[-5:], cell.reply) for cell in self._cells.values()]
                raise AssertionError(f"waited in vain; last seen: {seen[-1:]}")
            self._take()

    def _take(self) -> None:
        ready = dict(self._poller.poll(50))
        for channel, get in (
            (self._client.iopub_channel, self._on_iopub),
            (self._client.shell_channel, self._on_shell),
            (self._client.stdin_channel, self._on_stdin),
        ):
            if channel.socket in ready:
                get(channel.get_msg(timeout=1))

    def _cell_of(self, message: Message) -> Cell | None:
        return self._cells.get(message["parent_header"].get("msg_id", ""))

    def _on_iopub(self, message: Message) -> None:
        cell = self._cell_of(message)
        if cell is None:
            self._loose.append(message)
            return
        cell.everything.append(message)
        if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
            cell.idle = True

    def _on_shell(self, message: Message) -> None:
        cell = self._cell_of(message)
        if cell is not None:
            assert not cell.reply, "answered twice"
            cell.reply = message["content"]

    def _on_stdin(self, message: Message) -> None:
        cell = self._cell_of(message)
        assert cell is not None, message
        cell.prompts.append(message["content"])
        if cell.answers:
            self._client.input(cell.answers.pop(0))

    # -- processes ---------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Every process that this notebook's kernel has started, directly or not, and itself."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(
                "MLINFRA_TEST"
            ) == str(self.folder)
        except psutil.Error:
            return False

    def agents(self) -> list[psutil.Process]:
        return [process for process in self.processes() if _runs(process, "mlinfra_sdk.worker")]

    def workers(self) -> list[psutil.Process]:
        return [
            process for process in self.processes() if _runs(process, "mlinfra_sdk.worker.kernel")
        ]

    @property
    def kernel(self) -> psutil.Process:
        """The local kernel."""
        return psutil.Process(self._manager.provisioner.process.pid)

    def machines(self) -> list[Path]:
        """State directories of machines."""
        folder = self.home / "machines"
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def shut_down(self) -> None:
        """End the kernel as a front end does."""
        self._client.stop_channels()
        self._manager.shutdown_kernel()
        self._manager.cleanup_resources()

    def restart(self) -> None:
        """Restart the kernel as a front end does."""
        self._client.stop_channels()
        self._manager.restart_kernel()
        self._connect()
        self.run("%load_ext jupyter_mlinfra")

    def kill(self) -> None:
        """End the local kernel without any chance to clean up."""
        self._manager.provisioner.process.kill()
        self._manager.provisioner.process.wait()

    def close(self) -> None:
        """End everything; nothing may be left behind."""
        if self._manager.has_kernel:
            self.shut_down()
        try:
            until(lambda: not self.processes(), "processes to end", lambda: self.processes())
            assert self.machines() == []
            left = [path for path in self.temporary.glob("mlinfra-*") if any(path.iterdir())]
            assert left == []
        finally:
            for process in self.processes():
                process.kill()


def _runs(process: psutil.Process, module: str) -> bool:
    try:
        return module in process.cmdline()
    except psutil.Error:
        return False


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended, its parent having noticed or not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def end_of(name: str) -> str:
    """Wait until a machine has ended by itself; gives the reason that the ledger keeps."""
    ledger = Ledger.open()
    try:
        until(
            lambda: not [it for it in portal().call(lifecycle.settle(ledger)) if it.name == name],
            f"the end of {name}",
        )
        return next(it.stop_reason for it in ledger.machines(active=False) if it.name == name)
    finally:
        ledger.close()


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[Notebook]:
    """A notebook that leaves nothing behind."""
    notebook = Notebook(folder, **options)
    try:
        yield notebook
    finally:
        notebook.close()
