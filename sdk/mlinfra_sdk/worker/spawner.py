"""Agents that somebody else has to start: the batch script of a Slurm job, say.

What Slurm starts besides that script ends with its own step, and the job goes on when nothing is
left in it. So the script waits at a named pipe for the command of the agent, and becomes it: the
job is over when the agent is.
"""

from __future__ import annotations

import os
import select
import shlex
import sys
from pathlib import Path
from typing import IO

from mlinfra_sdk.errors import ProviderError

VARIABLE = "MLINFRA_SPAWNER"
"""Names the pipe, where there is one."""
_PATIENCE = 60.0


def script(pipe: str, patience: int) -> list[str]:
    """The lines of a script for ``sh`` that runs what it is told through the pipe, and nothing if
    that does not come within so many seconds. Variables in the name of the pipe are the
    script's."""
    return [
        "#!/bin/sh",
        "umask 077",
        f'pipe="{pipe}"',
        'mkfifo "$pipe" || exit 1',
        "trap 'rm -f \"$pipe\"; exit 1' INT TERM",
        f'command=$(timeout {patience} head -n 1 "$pipe")',
        'rm -f "$pipe"',
        'eval "$command"',
    ]


def spawn(pipe: Path, folder: Path) -> tuple[IO[bytes], IO[bytes]]:
    """Have the agent of a prepared folder started; gives its standard output and what it writes
    to standard error. Raises :class:`ProviderError`."""
    output, complaints = folder / "output", folder / "stderr"
    output.unlink(missing_ok=True)
    os.mkfifo(output, 0o600)
    complaints.touch(mode=0o600)
    program = shlex.join([sys.executable, "-m", "mlinfra_sdk.worker", str(folder)])
    paths = [shlex.quote(str(path)) for path in (folder / "pid", output, complaints)]
    command = "echo $$ >{}; exec {} </dev/null >{} 2>{}\n".format(paths[0], program, *paths[1:])
    reading = os.open(output, os.O_RDONLY | os.O_NONBLOCK)
    try:
        try:
            writing = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            raise ProviderError(
                f"The job does not wait for an agent any more: {error.strerror}.", hint="Try again."
            ) from None
        with open(writing, "wb") as it:
            it.write(command.encode())
        # Before the agent has opened its end the pipe would look as if it had ended.
        waiting = select.poll()
        waiting.register(reading, select.POLLIN)
        if not waiting.poll(_PATIENCE * 1000):
            raise ProviderError(f"The job did not start the agent in {_PATIENCE:g} s.")
        os.set_blocking(reading, True)
    except BaseException:
        os.close(reading)
        raise
    finally:
        output.unlink()
    return open(reading, "rb"), open(complaints, "rb")
