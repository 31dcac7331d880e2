"""A real sshd on loopback with keys and a home directory of its own, and a user who knows it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from live import until

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"

_SSHD_CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
PidFile {folder}/pid
AuthorizedKeysFile {folder}/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
MaxStartups 50
MaxSessions 50
LogLevel VERBOSE
SetEnv {environment}
"""

_SSH_CONFIG = """\
Host box
  HostName 127.0.0.1
  Port {port}
  IdentityFile {folder}/id
  IdentitiesOnly yes
Host *
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
"""


def keygen(path: Path, *options: str) -> None:
    path.unlink(missing_ok=True)
    quiet = ["ssh-keygen", "-q", "-t", "ed25519", "-f", str(path), "-N", ""]
    subprocess.run([*quiet, *options], check=True)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Sshd:
    """A host called ``box``. ``folder`` holds its keys and the user's; ``home`` is the home
    directory over there, and ``bin`` the only commands there beside those of the system."""

    def __init__(self, folder: Path, *, prefix: Sequence[str] = (), **environment: str) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.port = free_port()
        for path in (folder, self.home, folder / "client"):
            path.mkdir(parents=True, exist_ok=True)
        keygen(folder / "host_key")
        keygen(folder / "id")
        shutil.copy(folder / "id.pub", folder / "authorized_keys")
        self.know()
        self.environment = {"HOME": str(self.home), "PATH": os.environ["PATH"]} | environment
        pairs = " ".join(f'"{key}={value}"' for key, value in self.environment.items())
        (folder / "sshd_config").write_text(
            _SSHD_CONFIG.format(port=self.port, folder=folder, environment=pairs)
        )
        self.configure(_SSH_CONFIG.format(port=self.port, folder=folder))
        self._prefix = list(prefix)
        self._process: subprocess.Popen[bytes] | None = None

    def configure(self, text: str) -> None:
        """Replace the user's ~/.ssh/config, which is read by way of a wrapper in ``bin``: ssh
        takes the home directory from the password file, not from $HOME."""
        (self.folder / "ssh_config").write_text(text)
        tools = self.folder / "client"
        wrapper = tools / "ssh"
        ssh = shutil.which("ssh", path=os.defpath + ":/usr/bin:/usr/local/bin")
        wrapper.write_text(f'#!/bin/sh\nexec {ssh} -F {self.folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)

    def know(self) -> None:
        """Put the present host key into the user's known hosts."""
        key = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {key}")

    def start(self) -> None:
        with open(self.folder / "sshd.log", "ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")],
                stderr=log,
            )
        until(self.answers, "sshd", lambda: (self.folder / "sshd.log").read_text())

    def answers(self) -> bool:
        with closing(socket.socket()) as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        """End the server; connections that exist go on, as with a real one."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def connections(self) -> list[int]:
        """Processes of the server that hold a connection each."""
        found = subprocess.run(
            ["pgrep", "-f", f"sshd: .*|{self.folder}/sshd_config"], capture_output=True, text=True
        )
        return [int(pid) for pid in found.stdout.split()]

    @property
    def client_environment(self) -> dict[str, str]:
        """For a process whose ``ssh`` knows this host."""
        return {"PATH": f"{self.folder}/client:{os.environ['PATH']}"}


@contextmanager
def running(folder: Path, **options: str) -> Iterator[Sshd]:
    sshd = Sshd(folder, **options)
    sshd.start()
    try:
        yield sshd
    finally:
        sshd.stop()
