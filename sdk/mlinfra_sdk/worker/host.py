"""The machines of one user on one host: folders with an agent each, started, looked at and ended.

``on=local`` calls these functions; other hosts run ``python -m mlinfra_sdk.worker.host HOME
COMMAND [KEY]``, which prints the relay's start marker and then one line of JSON.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import msgspec
import psutil

from mlinfra_sdk.catalog import Device, Gpus
from mlinfra_sdk.errors import MlinfraError, ProviderError, StateError
from mlinfra_sdk.link.relay import MARKER
from mlinfra_sdk.worker import gpus, installed, spawner
from mlinfra_sdk.worker.folder import (
    ENDED,
    ENVIRONMENT,
    READY,
    SOCKET,
    Config,
    load_config,
    remove_sockets,
    save_config,
)

_OF_ONE_AGENT = ("pid", "config", SOCKET, READY, ENDED, ENVIRONMENT)
_STOP_PATIENCE = 5.0
_RECORD = 1 << 16
"""Bytes that the record of an end has at most."""
KEPT = b"k"
_KEPT_PATIENCE = 60.0


class Status(msgspec.Struct, frozen=True):
    """Whether a machine lives; ``reason`` says why it ended, ``ended_at`` when (Unix time). ``now``
    is the clock of the host that tells, if that may be another one; ``seconds`` is how long the
    machine has lived, by a clock that nobody sets."""

    alive: bool
    reason: str = ""
    ended_at: float | None = None
    now: float | None = None
    seconds: float | None = None

    def here(self) -> Status:
        """The same by this computer's clock; hosts' clocks may be wrong by hours."""
        if self.ended_at is None or self.now is None:
            return self
        ended_at = self.ended_at + time.time() - self.now
        return msgspec.structs.replace(self, ended_at=ended_at, now=None)


class _Ended(msgspec.Struct, frozen=True):
    """What :func:`record_end` writes."""

    reason: str
    at: float
    seconds: float | None = None


def status(folder: Path) -> Status:
    """Whether the agent's process lives."""
    if _agent_process(folder) is not None:
        return Status(True)
    return recorded_end(folder / ENDED) or Status(False, "its process is gone")


def recorded_end(path: Path) -> Status | None:
    """What an agent has written down at its end; None if it had no time to."""
    with suppress(OSError, msgspec.MsgspecError):
        with open(path, "rb") as file:
            ended = msgspec.json.decode(file.read(_RECORD), type=_Ended)
        return Status(False, ended.reason, ended.at, time.time(), ended.seconds)
    return None


def living(machines: Path) -> list[Path]:
    """The folders of all agents that run."""
    return [folder for folder in _folders(machines) if _agent_process(folder) is not None]


def remains(machines: Path) -> list[Path]:
    """The folders of agents that are gone, with runs to be collected."""
    return [
        folder
        for folder in _folders(machines)
        if _has_runs(folder) and _agent_process(folder) is None
    ]


def serves(folder: Path) -> bool:
    """Whether an agent runs there and its launcher knew. One whose launcher was killed before is
    ended, for it may be about to do so itself."""
    process = _agent_process(folder)
    if process is None:
        return False
    if not (folder / READY).exists():
        _end(process)
        return False
    return True


def prepare(folder: Path, config: Config, previous: Path | None) -> None:
    """Make the folder for an agent, which takes over what the folder ``previous`` holds."""
    if previous is not None:
        previous.rename(folder)
    if _has_runs(folder):  # also of a launch that was killed after it had taken them over
        for name in _OF_ONE_AGENT:
            (folder / name).unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
    save_config(folder, config)


class Starting:
    """An agent that has been started and may not listen yet."""

    def __init__(
        self,
        folder: Path,
        output: IO[bytes],
        stderr: IO[bytes],
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self._folder = folder
        self._output = output
        self._stderr = stderr
        self._process = process

    def wait(self) -> None:
        """Until it listens. Raises :class:`ProviderError` with what it said if it ends instead."""
        with self._output, self._stderr:
            if self._output.readline() == b"ready\n":
                (self._folder / READY).touch(mode=0o600)
                return
            if self._process is not None:
                self._process.wait()
            self._stderr.seek(0)
            said = self._stderr.read().decode(errors="replace").strip()[-2000:]
        raise ProviderError(
            f"The worker did not start: {said or 'it ended at once'}.",
            hint="`mlinfra doctor` checks the installation.",
        )


def start(folder: Path) -> Starting:
    """Start the agent of a prepared folder as a process of its own session, or have it started by
    who is there for that."""
    pipe = os.environ.get(spawner.VARIABLE)
    if pipe:
        return Starting(folder, *spawner.spawn(Path(pipe), folder))
    stderr = tempfile.TemporaryFile()  # noqa: SIM115  (wait() closes it)
    process = subprocess.Popen(
        [sys.executable, "-m", "mlinfra_sdk.worker", str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
    )
    file = os.open(folder / "pid", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(file, "w") as pid:
        pid.write(str(process.pid))
    assert process.stdout is not None
    return Starting(folder, process.stdout, stderr, process)


def stop(folder: Path) -> None:
    """End the agent and its kernels, and remove the machine's folder, unless detached runs in it
    wait to be collected. Stopping twice is no error."""
    process = _agent_process(folder)
    if process is not None:
        _end(process)
    remove_sockets(folder)
    if not _has_runs(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _folders(machines: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        return sorted(path for path in machines.iterdir() if path.is_dir())
    return []


def _is_needed(folder: Path) -> bool:
    """Whether an agent may run there, also on another host that has the same disk, or runs wait."""
    ended = (folder / ENDED).exists() and _agent_process(folder) is None
    return not ended or _has_runs(folder)


def _has_runs(folder: Path) -> bool:
    with suppress(FileNotFoundError):  # another process is just clearing it away
        return any(folder.glob("runs/*/run.json"))
    return False


def _agent_process(folder: Path) -> psutil.Process | None:
    """The agent's process, unless it is gone or its number belongs to another one now. It is known
    by its command: the time at which it began changes with the clock."""
    try:
        process = psutil.Process(int((folder / "pid").read_text().split()[0]))
        command = process.cmdline()
        same = "mlinfra_sdk.worker" in command and Path(command[-1]).name == folder.name
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (OSError, ValueError, IndexError, psutil.Error):
        return None


def _end(process: psutil.Process) -> None:
    """End an agent and all that it started. SIGTERM may be its notice of a preemption."""
    with suppress(psutil.NoSuchProcess):
        family = [process, *process.children(recursive=True)]
        process.send_signal(signal.SIGINT)
        _, left = psutil.wait_procs(family, timeout=_STOP_PATIENCE)
        for survivor in left:
            with suppress(psutil.NoSuchProcess):
                survivor.kill()
        psutil.wait_procs(left, timeout=_STOP_PATIENCE)


# -- what other hosts run ------------------------------------------------------------------------


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """A machine to be started, as it is read from standard input. ``config`` leaves ``store`` and
    ``cwd`` to the host; ``gpu`` must be there, else nothing starts (``where`` is for the error)."""

    key: str
    config: Config
    gpu: Gpus | None = None
    where: str = ""
    previous: str = ""


class Launched(msgspec.Struct, frozen=True):
    """A machine that runs: its secret, which is an earlier one's if that has the same key."""

    folder: str
    secret: bytes
    gpus: list[Device]


class Answer(msgspec.Struct, frozen=True):
    """What a command prints: its result, or an error of the class named ``kind``."""

    result: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""
    hint: str = ""
    kind: str = ""


class Host:
    """The directory ``home`` of this user on this host, and the machines in it."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._machines = home / "machines"

    def folder(self, key: str) -> Path:
        """Where the machine of this key lies."""
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", key) is None:
            raise ProviderError(f"{key!r} is no key of a machine.")
        return self._machines / key

    def launch(self, launch: Launch) -> tuple[Launched, bool]:
        """Start the machine, unless it runs; also gives whether this has started it."""
        if launch.gpu is not None:
            gpus.require(launch.gpu, launch.where)
        folder = self.folder(launch.key)
        fresh = not serves(folder)
        if fresh:
            try:
                config = msgspec.structs.replace(
                    launch.config, store=str(self._home / "store"), cwd=str(folder / "work")
                )
                previous = self.folder(launch.previous) if launch.previous else None
                prepare(folder, config, previous)
                installed.claim(folder)
                Path(config.cwd).mkdir(exist_ok=True)
                start(folder).wait()
            except BaseException:
                stop(folder)
                raise
        return Launched(str(folder), load_config(folder).secret, gpus.present()), fresh

    def tidy(self) -> int:
        """Remove environments of the SDK that nobody needs any more, and say how many."""
        if not installed.is_in(self._home):
            return 0
        with self.locked():
            needing = [folder for folder in _folders(self._machines) if _is_needed(folder)]
            out = installed.take_out(self._home, needing)
        installed.remove(out)
        return len(out)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time starts or stops machines. Raises :class:`StateError` if others can
        get at the directory."""
        self._machines.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (self._home, self._machines):
            info = path.stat()
            if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077:
                raise StateError(
                    f"{path} belongs to others, or others can read it.",
                    hint=f"Make it yours alone: chmod 700 {path}",
                )
        with open(self._machines / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def main() -> None:
    """Do one command. A launch whose client does not confirm that it knows of it is taken back:
    nothing runs on that nobody waits for."""
    home, command, *keys = sys.argv[1:]
    host = Host(Path(home))
    try:
        if command == "launch":
            launch = msgspec.msgpack.decode(_read_frame(), type=Launch)
            with host.locked():
                launched, fresh = host.launch(launch)
                _print(launched)
                if fresh and not _is_kept():
                    stop(Path(launched.folder))
            return
        folders = [host.folder(key) for key in keys]
        match command:
            case "status":
                _print(status(folders[0]))
            case "secret":
                _print(load_config(folders[0]).secret)
            case "stop":
                with host.locked():
                    stop(folders[0])
                _print(None)
            case "machines":
                machines = Path(home) / "machines"
                _print([[folder.name for folder in find(machines)] for find in (living, remains)])
    except MlinfraError as error:
        _answer(Answer(error=error.message, hint=error.hint, kind=type(error).__name__))
    except OSError as error:
        what = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        _answer(Answer(error=what, kind="ProviderError"))


def _read_frame() -> bytes:
    """Four bytes of length and as many as they say: not all channels can end standard input."""
    data = b""
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
        more = os.read(0, 65536)
        if not more:
            raise ProviderError("The connection ended in the middle of a launch.")
        data += more
    return data[4:]


def _is_kept() -> bool:
    """Whether the client confirms that it knows of the machine."""
    answered, _, _ = select.select([0], [], [], _KEPT_PATIENCE)
    return bool(answered) and os.read(0, 1) == KEPT


def _print(result: Any) -> None:
    _answer(Answer(result=msgspec.Raw(msgspec.json.encode(result))))


def _answer(answer: Answer) -> None:
    data = MARKER + msgspec.json.encode(answer) + b"\n"
    with suppress(OSError):  # nobody listens any more, which a launch finds out by itself
        while data:
            data = data[os.write(1, data) :]


if __name__ == "__main__":
    main()
