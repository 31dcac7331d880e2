"""``python -m mlinfra_sdk.link.port SOCKET PORT``: a TCP port that leads to the agent.

It runs on machines whose provider forwards a port through a tunnel of its own. Each connection is
greeted with the relay's start marker and handed over to the agent on its unix socket, where it has
to prove that it knows the session secret; until then nothing is done for it. It needs the standard
library only, and ends with its machine.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading

from mlinfra_sdk.link.relay import MARKER, relay

MOST = 32
"""Connections at once. Strangers may open some, too; each is closed by the agent soon."""


def serve(listener: socket.socket, path: str) -> None:
    """Hand over what comes, for ever."""
    free = threading.Semaphore(MOST)
    while True:
        connection, _ = listener.accept()
        if not free.acquire(blocking=False):
            connection.close()
            continue
        threading.Thread(target=_hand_over, args=(connection, path, free), daemon=True).start()


def _hand_over(connection: socket.socket, path: str, free: threading.Semaphore) -> None:
    try:
        with connection, socket.socket(socket.AF_UNIX) as agent, contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            agent.connect(os.path.basename(path))
            connection.sendall(MARKER)
            relay(agent, connection.fileno(), connection.fileno())
    finally:
        free.release()


def main() -> None:
    """Listen on all addresses of the machine, which the tunnel comes from."""
    path, port = sys.argv[1:]
    os.chdir(os.path.dirname(path) or ".")  # a socket's address holds about 100 bytes
    with socket.create_server(("", int(port))) as listener:
        serve(listener, path)


if __name__ == "__main__":
    main()
