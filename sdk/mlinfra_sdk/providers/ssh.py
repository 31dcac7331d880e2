"""``on=ssh:HOST``: a machine of the user's own, over the system's ``ssh``.

Everything that ``ssh HOST`` knows holds here, too: aliases, keys, agents, jump hosts, known hosts.
Nothing is asked: a key that needs a passphrase must be in an agent. All commands share one
connection. The agent ends by itself (idle, time, lease); the host is the user's and goes on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import anyio.to_thread
import msgspec

from mlinfra_sdk import paths
from mlinfra_sdk.errors import LinkError, ProviderError, RequestError
from mlinfra_sdk.ledger import Price
from mlinfra_sdk.link.processes import open_process
from mlinfra_sdk.link.wire import ProcessWire
from mlinfra_sdk.providers.base import Capabilities, Handle, Offer, Problem
from mlinfra_sdk.providers.remote import ExecProvider, Remote, ask, find, gpu_of
from mlinfra_sdk.spec import Request

_START_SECONDS = 3.0
_KEPT_SECONDS = 60
"""How long the shared connection is kept when nothing uses it."""
_CONTROL_PATH_LIMIT = 40
"""Bytes of a folder's name that leave room for ssh's own 58 in the address of a socket."""
_CHECK_SECONDS = 10
_QUIET = (
    "-oBatchMode=yes",
    "-oConnectTimeout=15",
    "-oServerAliveInterval=5",
    "-oServerAliveCountMax=3",
    "-oControlMaster=auto",
    f"-oControlPersist={_KEPT_SECONDS}",
    "-oClearAllForwardings=yes",
    "-oRemoteCommand=none",
    "-oLogLevel=ERROR",
    "-T",
)
_FAST_CIPHER = "aes128-gcm@openssh.com"
_LOOK_SECONDS = 5
_FAULTS = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is not the one that is known: another machine answers, or it was set up anew",
        "If it was set up anew, remove the old key: ssh-keygen -R HOST",
    ),
    (
        "Host key verification failed|host key is known",
        "its host key is not known yet",
        "Connect once by hand and compare the key: ssh HOST",
    ),
    (
        "Permission denied|Too many authentication failures",
        "it refuses to log in without a question",
        "Put a key into your ssh agent or ~/.ssh/config, so that this asks for nothing: ssh HOST",
    ),
    (
        "Could not resolve hostname",
        "there is no host of this name",
        "Check the name, or add an alias to ~/.ssh/config.",
    ),
    (
        "Connection refused|timed out|No route to host|unreachable|Connection closed|reset",
        "it does not answer",
        "Check that it runs and that this works: ssh HOST",
    ),
)


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a target: the ``host`` (an alias of ``~/.ssh/config`` or user@host:port), where to keep
    everything there (``home``), and which ``python`` to use."""

    host: str = ""
    home: str = ""
    python: str = ""


class SshRemote(Remote):
    """Commands on a host, over one shared connection."""

    def __init__(self, host: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.@:\[\]%+][A-Za-z0-9_.@:\[\]%+-]*", host):
            raise RequestError(
                f"{host!r} is no name of an ssh host." if host else "on=ssh needs a host.",
                hint="Write on=ssh:HOST with an alias of ~/.ssh/config or user@host:port.",
            )
        self.where = f"ssh:{host}"
        self._host = host

    def command(self, *options: str) -> list[str]:
        """``ssh`` with its options, of which the first has the say, and the host."""
        destination = self._host
        if re.search(r":\d+$", destination):
            destination = f"ssh://{destination}"
        path = f"-oControlPath={_control_folder()}/%C"
        return ["ssh", *options, *_QUIET, *_ciphers(destination), path, "--", destination]

    async def exec(self, argv: Sequence[str]) -> ProcessWire:
        """Start a command there; the login shell may be any that knows single quotes."""
        command = await anyio.to_thread.run_sync(self.command)
        return await open_process([*command, shlex.join(argv)])

    def interactive(self, argv: Sequence[str]) -> list[str]:
        """With a terminal over there."""
        words = ["-t" if word == "-T" else word for word in self.command()]
        return [*words, shlex.join(argv)]

    def explain(self, complaint: str) -> LinkError:
        """What ssh complained of, and what to do."""
        for pattern, what, hint in _FAULTS:
            if re.search(pattern, complaint):
                said = complaint.strip().splitlines()[-1] if pattern[:3] != "REM" else ""
                return LinkError(
                    f"{self.where} cannot be used: {what}{f' ({said})' if said else ''}.",
                    hint=hint.replace("HOST", self._host),
                )
        return super().explain(complaint)


@functools.cache
def _ciphers(destination: str) -> tuple[str, ...]:
    """An option that prefers AES-GCM where this processor has instructions for AES, unless the
    user's configuration says anything of ciphers. What ssh prefers by itself takes almost twice the
    processor's time for each byte, which is what bounds large transfers."""
    if not _has_aes():
        return ()
    default, mine = _configured("-F", "none", destination), _configured(destination)
    if default != mine or _FAST_CIPHER not in default:
        return ()
    return (f"-oCiphers={','.join(dict.fromkeys([_FAST_CIPHER, *default]))}",)


def _configured(*arguments: str) -> list[str]:
    """The ciphers that ssh would offer, best first; nothing where it does not tell."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["ssh", "-G", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_LOOK_SECONDS,
        )
        found = re.search(r"^ciphers (\S+)$", done.stdout, re.MULTILINE)
        if found:
            return found[1].split(",")
    return []


def _has_aes() -> bool:
    if platform.system() == "Darwin":
        return True
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return re.search(r"^(flags|Features)\s*:.*\baes\b", text, re.MULTILINE) is not None


def _control_folder() -> str:
    """A private folder with a short name for the sockets of shared connections. It belongs to this
    state directory: processes with other ones may have other keys."""
    mine = hashlib.sha256(os.fsencode(paths.data_dir().absolute())).hexdigest()[:8]
    name = f"mlinfra-{os.getuid()}-{mine}"
    for parent in (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"):
        if parent and len(f"{parent}/{name}") <= _CONTROL_PATH_LIMIT and os.path.isdir(parent):
            break
    folder = Path(parent) / name
    folder.mkdir(mode=0o700, exist_ok=True)
    info = folder.lstat()
    if info.st_uid != os.getuid() or info.st_mode & 0o077 or folder.is_symlink():
        raise ProviderError(
            f"{folder} should be a folder of yours alone.", hint="Remove it, it is made again."
        )
    return str(folder)


_Handles = list[Handle]


class SshProvider(ExecProvider):
    """Agents on hosts of the user's own."""

    name: ClassVar[str] = "ssh"
    capabilities = Capabilities(hard_stop="worker", rented=False)
    options: ClassVar[type[msgspec.Struct]] = Options
    argument: ClassVar[str] = "host"
    grace: ClassVar[float] = 25.0

    def __init__(self, options: Options | None = None) -> None:
        self._options = options or Options()

    def check(self) -> list[Problem]:
        """Whether there is ssh, and whether the host of a target lets us in."""
        if shutil.which("ssh") is None:
            return [Problem("There is no ssh here.", "Install the OpenSSH client.")]
        if not self._options.host:
            return []
        remote = SshRemote(self._options.host)
        command = remote.command(f"-oConnectTimeout={_CHECK_SECONDS}", "-oControlPath=none")
        done = subprocess.run(
            [*command, "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode == 0:
            return []
        error = remote.explain(done.stderr)
        return [Problem(error.message, error.hint)]

    def remote(self, data: Mapping[str, str]) -> Remote:
        """The host that is named there."""
        return SshRemote(data["host"])

    async def offers(self, request: Request) -> list[Offer]:
        """The host, if it has the GPU that is asked for."""
        remote = SshRemote(self._options.host)
        gpu = await gpu_of(remote, request.gpu) if request.gpu is not None else None
        source = "set by price=" if request.price else "your own machine"
        price = Price(request.price, source, time.strftime("%Y-%m-%d"))
        return [Offer(self.name, gpu, price, _START_SECONDS)]

    async def launch(
        self, offer: Offer, request: Request, key: str, previous: Handle | None = None
    ) -> Handle:
        """Start an agent on the host; see :meth:`Provider.launch`."""
        return await self.start_agent(
            {"host": self._options.host},
            request,
            key,
            previous,
            home=self._options.home,
            python=self._options.python,
        )

    async def remains(self) -> list[Handle]:
        """Folders on the host whose agents are gone, with runs to be collected."""
        return (await self._machines())[1]

    async def list(self) -> list[Handle]:
        """Every agent of this user on the host."""
        return (await self._machines())[0]

    async def _machines(self) -> tuple[_Handles, _Handles]:
        """Those that live, and those that have ended."""
        host = self._options.host
        if not host:
            return [], []
        data = await find(SshRemote(host), self._options.home)
        if data is None:
            return [], []
        living, ended = await ask(SshRemote(host), data, "machines", tuple[list[str], list[str]])
        handles = [
            [Handle(self.name, key, {"host": host, **data}) for key in keys]
            for keys in (living, ended)
        ]
        return handles[0], handles[1]
