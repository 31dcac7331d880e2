"""A real sshd on loopback with keys and a home directory of its own, and a user who knows it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
from processes import free_port, until

from mlinfra_sdk.providers.ssh import SshRemote

SSH = shutil.which("ssh") or "/usr/bin/ssh"
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"

_SSHD_CONFIG = """\
ListenAddress {address}
Port {port}
HostKey {folder}/host_key
PidFile {folder}/pid
AuthorizedKeysFile {folder}/authorized_keys {folder}/keys/%u
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
MaxStartups 50
MaxSessions 50
LogLevel VERBOSE
Subsystem sftp internal-sftp
SetEnv {environment}
"""

_SSH_CONFIG = """\
Host box
  HostName 127.0.0.1
  Port {port}
  IdentityFile {folder}/id
  IdentitiesOnly yes
Host jumped
  HostName 127.0.0.1
  Port {port}
  IdentityFile {folder}/id
  ProxyJump box
Host *
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
"""


def keygen(path: Path, *options: str) -> None:
    path.unlink(missing_ok=True)
    quiet = ["ssh-keygen", "-q", "-t", "ed25519", "-f", str(path), "-N", ""]
    subprocess.run([*quiet, *options], check=True)


class Sshd:
    """A host called ``box``, ``jumped`` by way of itself. ``folder`` holds its keys and the
    user's; ``home`` is the home directory over there. ``within`` are words before a command that
    run it where the server is to be."""

    hosts: tuple[str, ...] = ("box", "jumped")
    address = "127.0.0.1"
    own_home = True
    """Whether everybody's home directory is ``home``."""

    def __init__(self, folder: Path, within: Sequence[str] = (), **environment: str) -> None:
        self.folder = folder
        self.within = within
        self.home = folder / "home"
        self.port = free_port()
        for path in (folder, self.home, folder / "client"):
            path.mkdir(parents=True, exist_ok=True)
        keygen(folder / "host_key")
        keygen(folder / "id")
        shutil.copy(folder / "id.pub", folder / "authorized_keys")
        self.know()
        self.environment = {
            "HOME": str(self.home),
            "PATH": os.environ["PATH"],
            "UV_OFFLINE": "1",  # tests talk to loopback only: packages come from this side
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": "",
        } | environment
        if not self.own_home:
            del self.environment["HOME"]
        pairs = " ".join(f'"{key}={value}"' for key, value in self.environment.items())
        (folder / "sshd_config").write_text(
            _SSHD_CONFIG.format(
                address=self.address, port=self.port, folder=folder, environment=pairs
            )
        )
        self.config = self.configuration()
        self.configure(self.config)
        self._process: subprocess.Popen[bytes] | None = None

    def configuration(self) -> str:
        """What the user's ssh knows of it at first."""
        return _SSH_CONFIG.format(port=self.port, folder=self.folder)

    def configure(self, text: str) -> None:
        """Replace the user's configuration. A wrapper names it: ssh takes the home directory from
        the password file, not from $HOME. Jump hosts are reached by the wrapper, too."""
        (self.folder / "ssh_config").write_text(text)
        wrapper = self.folder / "client" / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {SSH} -F {self.folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)

    def know(self) -> None:
        """Put the present host key into the user's known hosts."""
        key = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[{self.address}]:{self.port} {key}")

    def start(self) -> None:
        if os.getuid() == 0:  # which the package's service would do
            os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        with open(self.folder / "sshd.log", "ab") as log:
            self._process = subprocess.Popen(
                [*self.within, SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")],
                stderr=log,
            )
        until(self.answers, "sshd", lambda: (self.folder / "sshd.log").read_text())

    def answers(self) -> bool:
        with closing(socket.socket()) as probe:
            return probe.connect_ex((self.address, self.port)) == 0

    def stop(self) -> None:
        """End the server; connections that exist go on, as with a real one."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def cut(self) -> None:
        """End all connections, without a word to anybody."""
        assert self._process is not None
        for process in psutil.Process(self._process.pid).children(recursive=True):
            if process.name().startswith("sshd"):
                process.kill()

    @property
    def cache(self) -> Path:
        """Where everything of ours lies over there."""
        return self.home / ".cache" / "mlinfra"

    @contextmanager
    def known(self) -> Iterator[None]:
        """In this process ``ssh`` knows the host, and the state directory is a fresh one."""
        state = self.folder / "state"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", f"{self.folder}/client:{os.environ['PATH']}")
            patch.setenv("MLINFRA_HOME", str(state))
            try:
                yield
            finally:
                self.hang_up()

    def hang_up(self) -> None:
        """End the connection that the user's processes share."""
        for host in self.hosts:
            command = SshRemote(host).command("-Oexit")
            subprocess.run(command, capture_output=True)
        (path,) = [it.partition("=")[2] for it in command if it.startswith("-oControlPath=")]
        shutil.rmtree(Path(path).parent)


@contextmanager
def running(folder: Path, within: Sequence[str] = (), **options: str) -> Iterator[Sshd]:
    """A host that is there for a while."""
    sshd = Sshd(folder, within, **options)
    sshd.start()
    try:
        yield sshd
    finally:
        sshd.stop()


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[bool]:
    """A small file system of its own in ``folder``; False if this user may not mount any."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    may = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield may
    finally:
        if may:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
