"""What a Jupyter kernel is made to run, as source: programs with binary stdin and stdout by comms.

This file is executed in a kernel elsewhere, whose Python may be older and has nothing of ours: it
imports the standard library only. A comm to the target carries one program:

===========================  ====================================================================
comm_open, to the kernel     ``argv``
``{"at": n}`` and a buffer   bytes of stdin (to the kernel) or stdout; ``at`` is their position
``{"err": true}`` and one    bytes of stderr
``{"got": n}``               so many bytes of stdin were written, or of stdout used: what the
                             sender's window is made of
``{"ping": true}``           the client lives; answered by ``at``, ``got`` and ``exit`` as they are
``{"exit": n}``              the program has ended so
``{"fault": text}``          it could not be run
comm_close, to the kernel    end the program
===========================  ====================================================================
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

TARGET = "mlinfra.exec"
WINDOW = 8 << 20
"""Bytes under way in one direction, at most."""
WINDOW_MESSAGES = 64
"""Messages under way from the kernel, at most. A server drops what a kernel publishes faster than
its limit (1000 a second by default); what a message to the kernel causes resets its count."""
PIECE = 512 << 10
"""Bytes of one message, at most."""
SILENCE = 60.0
"""Seconds without a sign of the client after which its program is ended."""
PATIENCE = 3.0
"""Seconds that a program has after SIGTERM."""
LINGER = 2.0
"""Seconds after a program's end in which what it left in its pipes is sent: a child that goes on
may hold them open for ever."""
STDERR_LIMIT = 64 << 10
"""Bytes of stderr that are sent, which has no window of its own."""
_PIPE_BUFFER = 1 << 20
_F_SETPIPE_SZ = 1031  # the module has it from Python 3.10 on


class Program:
    """One program and the threads that carry its bytes."""

    def __init__(self, comm: Any, argv: list[str]) -> None:
        self._comm = comm
        self._changed = threading.Condition()
        self._pending: collections.deque[memoryview] = collections.deque()
        self._sent = self._used = self._written = 0
        self._status: int | None = None
        self._unused: collections.deque[int] = collections.deque()
        self._closed = False
        self._heard = time.monotonic()
        comm.on_msg(self._on_message)
        comm.on_close(lambda message: self._close())
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # beyond the user's limit: the default does
                fcntl.fcntl(pipe, _F_SETPIPE_SZ, _PIPE_BUFFER)  # type: ignore[arg-type]
        self._readers = [_start(self._read_stdout), _start(self._read_stderr)]
        _start(self._write_stdin)
        _start(self._await_end)
        _start(self._end_when_unwanted)

    def _on_message(self, message: dict[str, Any]) -> None:
        """Runs in the kernel's loop and never waits."""
        data = message["content"]["data"]
        with self._changed:
            self._heard = time.monotonic()
            self._pending.extend(message["buffers"])
            self._used = max(self._used, data.get("got", 0))
            while self._unused and self._unused[0] <= self._used:
                self._unused.popleft()
            self._changed.notify_all()
            if "ping" in data:
                ended = {} if self._status is None else {"exit": self._status}
                self._comm.send({"at": self._sent, "got": self._written, **ended})

    def _close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _write_stdin(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        told = 0
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._pending or self._closed)
                    if self._closed:
                        return
                    piece = self._pending.popleft()
                rest = memoryview(piece)
                while rest:
                    rest = rest[stdin.write(rest) :]
                self._written += len(piece)
                if self._written - told >= WINDOW // 4:
                    told = self._written
                    self._comm.send({"got": told})
        except OSError:
            pass  # it reads no more; the client hears of its end
        finally:
            stdin.close()

    def _read_stdout(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        with stdout:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._has_room() or self._closed)
                piece = os.read(stdout.fileno(), PIECE)
                if not piece or self._closed:
                    return
                with self._changed:
                    at, self._sent = self._sent, self._sent + len(piece)
                    self._unused.append(self._sent)
                    self._comm.send({"at": at}, buffers=[piece])

    def _has_room(self) -> bool:
        return self._sent - self._used < WINDOW and len(self._unused) < WINDOW_MESSAGES

    def _read_stderr(self) -> None:
        stderr = self._process.stderr
        assert stderr is not None
        left = STDERR_LIMIT
        with stderr:
            while True:
                piece = os.read(stderr.fileno(), 8192)
                if not piece:
                    return
                if left > 0:
                    self._comm.send({"err": True}, buffers=[piece])
                left -= len(piece)

    def _await_end(self) -> None:
        status = self._process.wait()
        for reader in self._readers:
            reader.join(LINGER)
        with self._changed:
            if not self._closed:
                self._status = status
                self._comm.send({"exit": status})
        self._close()

    def _end_when_unwanted(self) -> None:
        with self._changed:
            while not self._closed and time.monotonic() - self._heard < SILENCE:
                self._changed.wait(SILENCE / 4)
        self._close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                try:
                    os.killpg(self._process.pid, number)
                    self._process.wait(PATIENCE)
                except (OSError, subprocess.TimeoutExpired):
                    pass  # it has just ended, or not yet


def _start(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def open_program(comm: Any, message: dict[str, Any]) -> None:
    """What the kernel does with a comm to the target."""
    try:
        Program(comm, message["content"]["data"]["argv"])
    except (OSError, ValueError) as error:
        comm.send({"fault": str(error)})


def install() -> None:
    """Teach the kernel the target."""
    get_ipython().kernel.comm_manager.register_target(  # type: ignore[name-defined]  # noqa: F821
        TARGET, open_program
    )


if __name__ == "__main__":
    install()
