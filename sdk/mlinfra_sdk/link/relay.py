"""``python -m mlinfra_sdk.link.relay SOCKET``: stdio to the agent's unix socket and back.

It runs on the machine, at the end of whatever reaches it (ssh, ``kubectl exec``, a container).  It
exits when nothing has arrived from either side for some heartbeats: on some providers a hanging
exec counts as activity and would keep the meter running.  It needs the standard library only,
because it starts anew after every cut.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading

MARKER = b"\n\x00\xffmlinfra-link-1\xff\x00\n"
"""Written before the first byte of the link; what a login shell printed before is noise."""

QUIET_LIMIT = 30.0
"""Seconds without a byte from one side after which the relay exits (a ping comes every 5)."""

_CHUNK = 256 << 10


def relay(
    connection: socket.socket, source: int, sink: int, quiet_limit: float = QUIET_LIMIT
) -> None:
    """Carry bytes both ways until one side ends or falls silent for ``quiet_limit`` seconds."""
    ended = threading.Event()
    for read_fd, write_fd in ((source, connection.fileno()), (connection.fileno(), sink)):
        threading.Thread(
            target=_carry, args=(read_fd, write_fd, quiet_limit, ended), daemon=True
        ).start()
    ended.wait()


def _carry(read_fd: int, write_fd: int, quiet_limit: float, ended: threading.Event) -> None:
    buffer = memoryview(bytearray(_CHUNK))
    readable = select.poll()
    readable.register(read_fd, select.POLLIN)
    try:
        while readable.poll(quiet_limit * 1000):
            count = os.readv(read_fd, [buffer])
            if not count:
                break
            rest = buffer[:count]
            while rest:
                rest = rest[os.write(write_fd, rest) :]
    except OSError:
        pass  # the other side is gone: the session goes on over the next relay
    finally:
        ended.set()


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
    for fd in (0, 1):  # whoever started this may have left its own mode behind
        os.set_blocking(fd, True)
    os.write(1, MARKER)
    relay(connection, source=0, sink=1)
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # a thread may be stuck in a write to a side that is gone
