"""Running uv: what it says of its progress, and its failures as errors of ours."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import anyio
import anyio.abc
from anyio.streams.text import TextReceiveStream

from mlinfra_sdk.errors import EnvironmentFailed, IndexUnreachable, PackageUnavailable

Tell = Callable[[str], None]

_LAST_LINES = 12
_CREDENTIALS = re.compile(r"(?<=://)[^/\s]+@")
_PROGRESS = re.compile(r"(Resolved|Downloading|Building|Prepared|Installed) .*")
_UNREACHABLE = re.compile(
    r"error sending request|failed to fetch|request failed after|network was disabled"
    r"|failed to download|HTTP status (client|server) error",
    re.IGNORECASE,
)
_FULL = "No space left on device"
_NOT_THERE = "No solution found"
# What a user has set for another environment, and what would change what is printed.
_NOT_PASSED_ON = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME", "UV_PROJECT")


def redacted(text: str) -> str:
    """The text without the credentials of URLs in it."""
    return _CREDENTIALS.sub("", text)


def uv_binary() -> str:
    """The program: of the package ``uv`` beside this interpreter's, else the one on the path."""
    try:
        from uv import find_uv_bin

        return find_uv_bin()
    except (ImportError, FileNotFoundError):
        found = shutil.which("uv")
    if found is None:
        raise EnvironmentFailed(
            "Environments are made by uv, which is not installed where the agent runs.",
            hint="Install the package uv beside mlinfra-sdk, or use env=none.",
        )
    return found


async def run_uv(
    arguments: Sequence[str],
    *,
    folder: Path,
    tell: Tell,
    indexes: Sequence[str] = (),
    env: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Run uv in ``folder`` and give what it writes to stdout; ``tell`` gets a line now and then.

    ``indexes`` may hold credentials: they are passed where nobody can see them, as is ``env``.
    Raises :class:`EnvironmentFailed` with uv's own last lines.
    """
    env = {key: it for key, it in os.environ.items() if key not in _NOT_PASSED_ON} | {**env}
    env |= {"UV_NO_PROGRESS": "1", "NO_COLOR": "1"}
    if indexes:
        env["UV_INDEX"] = " ".join([*indexes, *env.get("UV_INDEX", "").split()])
    process = await anyio.open_process(
        [uv_binary(), *arguments],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    lines: deque[str] = deque(maxlen=_LAST_LINES)
    output: list[str] = []

    async def listen(stream: anyio.abc.ByteReceiveStream, take: Callable[[str], None]) -> None:
        rest = ""
        async for text in TextReceiveStream(stream, errors="replace"):
            *whole, rest = (rest + text).split("\n")
            for line in whole:
                take(line)
        take(rest)

    def hear(line: str) -> None:
        line = redacted(line.rstrip())
        if _PROGRESS.fullmatch(line.strip()):
            tell(line.strip())
        elif line and not line.startswith(("Using Python", " +", " -", " Downloaded", " Built")):
            lines.append(line)

    assert process.stdout is not None and process.stderr is not None
    async with process, anyio.create_task_group() as tasks:
        tasks.start_soon(listen, process.stdout, output.append)
        tasks.start_soon(listen, process.stderr, hear)
        try:
            await process.wait()
        except BaseException:
            # With the builds that it has started: while they hold its pipes, nothing here ends.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise _failure("\n".join(lines))
    return "\n".join(output)


def _failure(said: str) -> EnvironmentFailed:
    text = f"The environment could not be made. uv says:\n{said}\n"
    if _FULL in said:
        return EnvironmentFailed(text, hint="Free some space on the machine's disk.")
    if _UNREACHABLE.search(said):
        return IndexUnreachable(
            text,
            hint="Check the machine's network and the index that it uses (UV_INDEX_URL there).",
        )
    return PackageUnavailable(text) if _NOT_THERE in said else EnvironmentFailed(text)
