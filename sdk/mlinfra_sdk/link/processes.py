"""Wires on the stdin and stdout of a command, which usually runs the relay elsewhere."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence

import anyio.to_thread

from mlinfra_sdk.errors import LinkError
from mlinfra_sdk.link.relay import MARKER
from mlinfra_sdk.link.wire import ProcessWire, Wire

_NOISE_LIMIT = 1 << 20
_NOISE_SHOWN = 2000


async def open_process(argv: Sequence[str], env: Mapping[str, str] | None = None) -> ProcessWire:
    """A wire on the stdin and stdout of the command ``argv``; closing it ends the command."""
    child_read, write_fd = os.pipe()
    read_fd, child_write = os.pipe()
    stderr = tempfile.TemporaryFile()  # noqa: SIM115  (the wire closes it)

    def start() -> subprocess.Popen[bytes]:
        # In a session of its own: an interrupt of the kernel's process group is not meant for it.
        return subprocess.Popen(
            list(argv),
            stdin=child_read,
            stdout=child_write,
            stderr=stderr,
            env=env,
            start_new_session=True,
        )

    try:
        process = await anyio.to_thread.run_sync(start)
    except BaseException as error:
        os.close(write_fd)
        os.close(read_fd)
        stderr.close()
        if isinstance(error, OSError):
            raise LinkError(
                f"`{argv[0]}` cannot be run: {error.strerror or error}.",
                hint="Install it or put it on the PATH.",
            ) from None
        raise
    finally:
        os.close(child_read)
        os.close(child_write)
    return ProcessWire(process, read_fd, write_fd, stderr)


async def open_relay(argv: Sequence[str], env: Mapping[str, str] | None = None) -> Wire:
    """A wire on the stdin and stdout of the command ``argv``, which must end up in the relay.

    What shells print before the relay's start marker is skipped; if the command ends without one,
    the error shows what it printed.
    """
    wire = await open_process(argv, env)
    try:
        await skip_to_marker(wire)
    except BaseException as error:
        complaint = wire.complaint()
        await wire.aclose()
        if isinstance(error, LinkError):
            raise LinkError(
                f"`{argv[0]}` did not reach the agent's relay: {error.message} {complaint}".strip(),
                hint=error.hint,
            ) from None
        raise
    return wire


async def skip_to_marker(wire: Wire) -> None:
    """Read up to and including the relay's start marker, one byte at a time at its end."""
    noise = bytearray()
    while not noise.endswith(MARKER):
        if len(noise) > _NOISE_LIMIT:
            raise LinkError(
                "it printed more than 1 MiB and no start marker.",
                hint="Silence what the login shell prints.",
            )
        # Never read past the marker: as much as is surely still missing of it.
        missing = len(MARKER) - _overlap(noise)
        space = bytearray(missing)
        count = await wire.receive_into(memoryview(space))
        if not count:
            printed = bytes(noise[-_NOISE_SHOWN:]).decode("utf-8", "replace").strip()
            raise LinkError(
                f"it ended before its start marker. {printed}".strip(),
                hint="Run the same command in a terminal to see why.",
            )
        noise += space[:count]


def _overlap(noise: bytearray) -> int:
    """How many bytes at the end of ``noise`` may be the beginning of the marker."""
    for length in range(min(len(noise), len(MARKER) - 1), 0, -1):
        if noise.endswith(MARKER[:length]):
            return length
    return 0
