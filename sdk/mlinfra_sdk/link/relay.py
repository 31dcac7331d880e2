"""``python -m mlinfra_sdk.link.relay SOCKET``: gives its stdio to the agent.

It runs on the machine, at the end of whatever reaches it (ssh, ``kubectl exec``, a container), and
hands the descriptors of its standard input and output over to the agent, on the agent's unix
socket. So what arrives is copied by nobody in between; the relay only stands by. It exits when the
agent is done with them, or has not said for some heartbeats that something arrives: on some
providers a hanging exec counts as activity and would keep the meter running. It needs the standard
library only, because it starts anew after every cut.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys

MARKER = b"\n\x00\xffmlinfra-link-1\xff\x00\n"
"""Written before the first byte of the link; what a login shell printed before is noise."""

HANDOVER = b"\x01"
"""Comes with the two descriptors; no frame begins with it."""

QUIET_LIMIT = 30.0
"""Seconds without a word of the agent after which the relay exits (a ping comes every 5)."""


def relay(
    connection: socket.socket, source: int, sink: int, quiet_limit: float = QUIET_LIMIT
) -> None:
    """Hand both descriptors over, and wait until the other side ends or falls silent."""
    socket.send_fds(connection, [HANDOVER], [source, sink])
    readable = select.poll()
    readable.register(connection, select.POLLIN)
    while readable.poll(quiet_limit * 1000) and connection.recv(4096):
        pass


def main() -> int:
    """Run the relay; the exit status is 1 if no agent listens on the socket."""
    connection = socket.socket(socket.AF_UNIX)
    path = sys.argv[1]
    try:
        # A socket address holds about 100 bytes: name the socket from its own directory.
        os.chdir(os.path.dirname(path) or ".")
        connection.connect(os.path.basename(path))
    except OSError as error:
        print(f"no agent answers at {path}: {error.strerror}", file=sys.stderr)
        return 1
    os.set_blocking(1, True)  # whoever started this may have left its own mode behind
    os.write(1, MARKER)
    with contextlib.suppress(OSError):  # the agent is gone: the session goes on over the next relay
        relay(connection, source=0, sink=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
