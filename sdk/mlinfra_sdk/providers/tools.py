"""Clients of services that need another Python, or packages that must not come into a notebook's
environment: they get an environment of their own, and are asked by JSON over stdio."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
from anyio.streams.buffered import BufferedByteReceiveStream

from mlinfra_sdk import errors, paths
from mlinfra_sdk.errors import LinkError, MlinfraError, ProviderError
from mlinfra_sdk.worker.uv import uv_binary

_LINE = 64 << 20
"""Bytes of the longest line that is taken from a script."""
_CLEAN = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME")


class Tool(msgspec.Struct, frozen=True):
    """A client: ``requirements`` are installed for a Python of at least version ``python``, and
    ``script`` is a file of ours that is run by it. The script reads one line of JSON from stdin
    and prints one :class:`Answer`, or for :func:`listen` one a line."""

    name: str
    requirements: tuple[str, ...]
    python: tuple[int, int]
    script: Path


class Answer(msgspec.Struct):
    """What a script prints: ``result``, or an ``error`` with its ``hint`` and its ``kind``, the
    name of a class in :mod:`mlinfra_sdk.errors`."""

    result: Any = None
    kind: str = ""
    error: str = ""
    hint: str = ""


async def ask(tool: Tool, request: Mapping[str, Any], environment: Mapping[str, str]) -> Any:
    """What the script answers to a request; its errors are raised as what they are. Cancelled, it
    is killed: whoever asks for something that must not be half done shields it."""
    python = await anyio.to_thread.run_sync(python_of, tool, abandon_on_cancel=True)
    done = await anyio.run_process(
        [str(python), "-I", str(tool.script)],
        input=msgspec.json.encode(request) + b"\n",
        check=False,
        env={**clean_environment(), **environment},
        start_new_session=True,  # Ctrl-C in a terminal is for this program
    )
    try:
        answer = msgspec.json.decode(done.stdout, type=Answer)
    except msgspec.DecodeError:
        said = done.stderr.decode("utf-8", "replace").strip()[-500:]
        raise ProviderError(
            f"{tool.requirements[0]} failed (status {done.returncode}): {said or 'it said nothing'}"
        ) from None
    return _result(answer)


async def listen(
    tool: Tool,
    request: Mapping[str, Any],
    take: Callable[[Any], Awaitable[None]],
    patience: float,
) -> None:
    """Give ``take`` every result of a script that prints many, as they come, until it ends; errors
    and being cancelled are as with :func:`ask`. Raises :class:`LinkError` if it is silent for more
    than ``patience`` seconds."""
    python = await anyio.to_thread.run_sync(python_of, tool, abandon_on_cancel=True)
    async with await anyio.open_process(
        [str(python), "-I", str(tool.script)],
        stderr=subprocess.DEVNULL,
        env=clean_environment(),
        start_new_session=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        lines = BufferedByteReceiveStream(process.stdout)
        try:
            await process.stdin.send(msgspec.json.encode(request) + b"\n")
            while True:
                with anyio.fail_after(patience):
                    line = await lines.receive_until(b"\n", _LINE)
                await take(_result(msgspec.json.decode(line, type=Answer)))
        except anyio.IncompleteRead:
            return
        except TimeoutError:
            raise LinkError(f"{tool.requirements[0]} has said nothing for long.") from None
        finally:
            with suppress(ProcessLookupError):
                process.kill()


def _result(answer: Answer) -> Any:
    if not answer.kind:
        return answer.result
    kind = getattr(errors, answer.kind, ProviderError)
    if not (isinstance(kind, type) and issubclass(kind, MlinfraError)):
        kind = ProviderError
    raise kind(answer.error, hint=answer.hint)


def place_of(tool: Tool) -> Path:
    """Where the tool's environment lies, or will lie."""
    version = ".".join(map(str, tool.python))
    name = re.sub(r"[^a-zA-Z0-9.]+", "-", "-".join([tool.name, version, *tool.requirements]))
    return paths.cache_dir() / "tools" / name


def extend(tool: Tool, requirement: str) -> None:
    """Have the tool's environment, which exists, meet one more requirement; it is looked for only
    once. Raises :class:`LinkError` if the packages cannot be had."""
    mark = place_of(tool) / f".with-{requirement}"
    if not mark.exists():
        _install(tool, place_of(tool), (*tool.requirements, requirement))
        mark.touch()


def python_of(tool: Tool) -> Path:
    """The interpreter of the tool's environment, which is made at the first use. Raises
    :class:`ProviderError` if there is no Python for it, or the packages cannot be had."""
    version = ".".join(map(str, tool.python))
    folder = place_of(tool)
    python = folder / "bin" / "python"
    if not python.exists():
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
        try:
            _make(tool, version, temporary)
            try:
                temporary.rename(folder)  # complete, or not there
            except OSError:
                if not python.exists():  # nobody else has made it meanwhile
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return python


def _make(tool: Tool, version: str, folder: Path) -> None:
    for interpreter in _interpreters(tool.python):
        said = _uv(
            "venv",
            "--quiet",
            "--allow-existing",
            "--relocatable",
            "--python",
            interpreter,
            str(folder),
        )
        if said is None:
            break
    else:
        raise ProviderError(
            f"on={tool.name} needs Python {version} or newer for {tool.requirements[0]}, which "
            f"runs beside this one, and uv could not get it: {said}",
            hint=f"Install one, as by `uv python install {version}`.",
        )
    _install(tool, folder, tool.requirements)


def _install(tool: Tool, folder: Path, requirements: Sequence[str]) -> None:
    python = str(folder / "bin" / "python")
    said = _uv("pip", "install", "--quiet", "--python", python, *requirements)
    if said is not None:
        raise LinkError(
            f"What on={tool.name} needs ({', '.join(requirements)}) could not be installed: {said}",
            hint="It comes from the package index that uv is set up for.",
        )


def _interpreters(least: tuple[int, int]) -> Iterator[str]:
    """What may be given to uv as ``--python``; its own search comes last, for it may download."""
    if sys.version_info[:2] >= least:
        yield sys.executable
    for folder in (Path.home() / ".pyenv" / "versions").glob("3.*"):
        # Those that are not chosen in pyenv stand on the path as scripts that fail.
        version = re.match(r"3\.(\d+)", folder.name)
        if version and (3, int(version[1])) >= least and (folder / "bin" / "python").exists():
            yield str(folder / "bin" / "python")
    yield f">={least[0]}.{least[1]}"


def _uv(*words: str) -> str | None:
    """Run uv; what it said if it failed, else None."""
    done = subprocess.run(
        [uv_binary(), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )
    return None if done.returncode == 0 else done.stderr.strip()[-500:] or "it said nothing."


def clean_environment() -> dict[str, str]:
    """This process's, without what would turn another Python's packages into this one's."""
    return {name: value for name, value in os.environ.items() if name not in _CLEAN}
