"""SkyPilot in an environment and a process of its own, asked by lines of JSON.

It has a hundred packages and takes seconds to import: neither may come into a notebook's kernel.
One process serves all that this one asks; it ends with it, or when it is not used for a while.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec

from mlinfra_sdk import errors
from mlinfra_sdk.errors import MlinfraError, ProviderError
from mlinfra_sdk.providers import tools

TOOL = tools.Tool(
    name="sky",
    requirements=("skypilot>=0.14.1,<0.15",),  # what helper.py calls was tried with these
    python=(3, 10),
    script=Path(__file__).with_name("helper.py"),
)
_EXTRAS = frozenset(
    (
        *("aws", "azure", "do", "fluidstack", "gcp", "hyperbolic", "ibm", "kubernetes"),
        *("lambda", "mithril", "nebius", "oci", "paperspace", "primeintellect", "runpod", "scp"),
        *("seeweb", "shadeform", "slurm", "ssh", "vast", "verda", "vsphere", "yotta"),
    )
)
"""Clouds for which SkyPilot needs more packages."""
_ALIASES = {"k8s": "kubernetes"}
_ENVIRONMENT = {
    "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
    "SKYPILOT_DEBUG": "0",
    "NO_COLOR": "1",
}
_LAST_WORDS = 500

Tell = Callable[[str], None]


class _Line(msgspec.Struct):
    id: int
    tell: str = ""
    result: Any = None
    kind: str = ""
    error: str = ""
    hint: str = ""


def command() -> Path:
    """SkyPilot's own command, in its environment."""
    return tools.place_of(TOOL) / "bin" / "sky"


def is_installed() -> bool:
    """Whether the environment was made; the first use of ``on=sky`` does it."""
    return command().exists()


class Engine:
    """Get it by :func:`engine`. What is asked of it raises the errors that SkyPilot's mean."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: _Process | None = None

    async def ask(self, op: str, *, tell: Tell = lambda text: None, **arguments: Any) -> Any:
        """Have an operation of ``helper.py`` done. ``tell`` is called in some thread. Who stops
        waiting does not stop the operation."""
        return await asyncio.wrap_future(self.begin(op, tell=tell, **arguments))

    def begin(self, op: str, *, tell: Tell = lambda text: None, **arguments: Any) -> Future[Any]:
        """The same for callers without an event loop. The environment must have been made."""
        with self._lock:
            if self._process is not None:
                try:
                    return self._process.begin(op, tell, arguments)
                except OSError:
                    pass  # it has ended, as it does when it is not used
            self._process = _Process()
            return self._process.begin(op, tell, arguments)


class _Process:
    """One process, and who waits for its answers."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._waiting: dict[int, tuple[Future[Any], Tell]] = {}
        self._lock = threading.Lock()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (the reader closes it)
        self._process = subprocess.Popen(
            [tools.place_of(TOOL) / "bin" / "python", "-I", TOOL.script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**tools.clean_environment(), **_ENVIRONMENT},
            start_new_session=True,  # Ctrl-C in a terminal is for this program
        )
        threading.Thread(target=self._read, name="mlinfra-sky", daemon=True).start()

    def begin(self, op: str, tell: Tell, arguments: Mapping[str, Any]) -> Future[Any]:
        """Send a request. OSError if the process is gone."""
        future: Future[Any] = Future()
        assert self._process.stdin is not None
        with self._lock:
            number = next(self._numbers)
            line = msgspec.json.encode({"id": number, "op": op, **arguments}) + b"\n"
            self._process.stdin.write(line)
            self._process.stdin.flush()
            if self._said.closed:
                raise BrokenPipeError
            self._waiting[number] = (future, tell)
        return future

    def _read(self) -> None:
        output = self._process.stdout
        assert output is not None
        with output:
            for text in output:
                line = msgspec.json.decode(text, type=_Line)
                if line.tell:
                    self._waiting.get(line.id, (None, _ignore))[1](line.tell)
                else:
                    self._answer(line)
        self._process.wait()
        with self._lock, self._said:
            self._said.seek(0)
            last = self._said.read().decode("utf-8", "replace").strip()[-_LAST_WORDS:]
            lost = list(self._waiting)
        for number in lost:
            said = f"SkyPilot's process ended: {last or 'it said nothing'}"
            self._answer(_Line(number, kind="LinkError", error=said))

    def _answer(self, line: _Line) -> None:
        with self._lock:
            future, _ = self._waiting.pop(line.id, (None, _ignore))
        if future is None or not future.set_running_or_notify_cancel():
            return
        if not line.kind:
            future.set_result(line.result)
            return
        kind = getattr(errors, line.kind, ProviderError)
        if not (isinstance(kind, type) and issubclass(kind, MlinfraError)):
            kind = ProviderError
        future.set_exception(kind(line.error, hint=line.hint))


def _ignore(text: str) -> None:
    return None


_engines: dict[int, Engine] = {}


def engine() -> Engine:
    """The one of this process; a fork has its own."""
    return _engines.setdefault(os.getpid(), Engine())


def prepare(clouds: Iterable[str]) -> None:
    """Make the environment if it is not there, with what SkyPilot needs for these clouds. Takes
    some seconds and 320 MB. Raises :class:`ProviderError`, or :class:`LinkError` without an
    index."""
    tools.python_of(TOOL)
    for cloud in clouds:
        name = cloud_of(cloud)
        if name in _EXTRAS:
            tools.extend(TOOL, f"skypilot[{name}]")


def cloud_of(infra: str) -> str:
    """The cloud of SkyPilot's ``infra``: ``aws`` of ``aws/us-east-1``."""
    cloud = infra.partition("/")[0].lower()
    return _ALIASES.get(cloud, cloud)
