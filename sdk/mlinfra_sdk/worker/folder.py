"""What lies in a machine's folder, which only its user can read (0700), and under which names.

``config`` says how the agent is to run, ``pid`` who it is, ``agent.sock`` is where it listens,
``ready`` says that its launcher knows so, ``ended.json`` why it has ended, ``sdk`` (on other hosts)
leads to the environment that it runs in, and ``runs`` holds what
waits to be collected.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from mlinfra_sdk.worker.journal import LIMIT
from mlinfra_sdk.worker.watchdog import Limits

SOCKET = "agent.sock"
SOCKETS = "sockets"
READY = "ready"
ENDED = "ended.json"
ENVIRONMENT = "sdk"
LAST_WORDS = "MLINFRA_LAST_WORDS"
"""Names a file in the environment that outlives the folder, for what ``ended.json`` says."""


class Config(msgspec.Struct):
    """How an agent is to run; a file that only this user can read (0600) in its directory."""

    secret: bytes
    store: str
    limits: Limits
    shared_fs: bool = False
    cwd: str = ""
    journal_limit: int = LIMIT
    grace: float = 0.0
    """Seconds between SIGTERM and the end of everything where that signal says that the machine is
    taken away; 0: it only says that the agent shall end."""
    prestart: bool = True
    """Whether the first kernel will have the agent's own packages, and can be started at once."""
    host: str = ""
    """``module:class`` of what runs cells in place of a :class:`KernelHost`, which it extends."""
    host_options: str = ""
    """The last argument of that class."""


def load_config(folder: Path) -> Config:
    """The configuration that the launcher left in the agent's directory."""
    return msgspec.msgpack.decode((folder / "config").read_bytes(), type=Config)


def save_config(folder: Path, config: Config) -> None:
    """Write the configuration, readable by this user only."""
    fd = os.open(folder / "config", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "wb") as file:
        file.write(msgspec.msgpack.encode(config))


def record_end(folder: Path, reason: str, seconds: float) -> None:
    """Write down why the agent has ended, that it is now, and after how many seconds; as far as
    that is possible: the folder may be gone, the disk full."""
    record = msgspec.json.encode({"reason": reason, "at": time.time(), "seconds": seconds})
    for path in (folder / ENDED, os.environ.get(LAST_WORDS)):
        if path:
            with suppress(OSError), open(path, "wb") as file:
                file.write(record)


def make_sockets(folder: Path) -> Path:
    """A folder for the sockets of kernels. Their addresses hold about 100 bytes, and the machine's
    own folder may be too deep; but from there it is found, should the agent not end in order."""
    remove_sockets(folder)
    parent = tempfile.gettempdir()
    sockets = Path(tempfile.mkdtemp(prefix="mlinfra-", dir=parent if len(parent) < 75 else "/tmp"))
    try:
        (folder / SOCKETS).symlink_to(sockets)
    except OSError:
        sockets.rmdir()
        raise
    return sockets


def remove_sockets(folder: Path) -> None:
    """Remove what an agent that is gone has left outside of its folder."""
    link = folder / SOCKETS
    if link.is_symlink():
        shutil.rmtree(link.readlink(), ignore_errors=True)
        link.unlink()
