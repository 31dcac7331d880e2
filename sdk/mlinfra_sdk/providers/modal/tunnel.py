"""The wire through Modal's tunnel: TLS up to Modal, then the machine's port.

A command's stdin takes one call for each piece, and waits for its answer; the tunnel is a stream.
Modal's part of it asks nobody who he is: the agent does (``link/port.py``).
"""

from __future__ import annotations

import random
import ssl
from typing import TYPE_CHECKING

import anyio

from mlinfra_sdk.errors import LinkError, MlinfraError
from mlinfra_sdk.link.processes import skip_to_marker
from mlinfra_sdk.link.wire import StreamWire, Wire
from mlinfra_sdk.providers.modal.errors import translated
from mlinfra_sdk.worker.folder import SOCKET

if TYPE_CHECKING:
    from modal import Sandbox

_PORTS = range(20_000, 32_000)
"""Of which one is taken in the sandbox: below those that its system gives out."""
_PATIENCE = 5.0
_PAUSE = 0.1
_WAITED_FOR = 10
"""Seconds that Modal has to tell the tunnel's address."""


def any_port() -> int:
    """A port for the agent that a user's own servers hardly want."""
    return random.choice(_PORTS)


async def opened(sandbox: Sandbox, home: str, python: str, key: str) -> str:
    """Have the machine's port lead to the agent; gives the tunnel's address as ``HOST:PORT``, or
    nothing if it does not work from here."""
    from modal.stream_type import StreamType

    silent = StreamType.DEVNULL
    try:
        with translated():
            tunnels = await sandbox.tunnels.aio(timeout=_WAITED_FOR)
            if not tunnels:  # made by settings of before
                return ""
            ((port, tunnel),) = tunnels.items()
            socket = f"{home}/machines/{key}/{SOCKET}"
            listen = [python, "-I", "-m", "mlinfra_sdk.link.port", socket, str(port)]
            await sandbox.exec.aio(*listen, stdout=silent, stderr=silent)
    except MlinfraError:
        return ""  # it only makes things faster
    host, outer = tunnel.tls_socket
    address = f"{host}:{outer}"
    with anyio.move_on_after(_PATIENCE):
        while True:
            wire = await connect(address)
            if wire is not None:
                await wire.aclose()
                return address
            await anyio.sleep(_PAUSE)
    return ""


async def connect(address: str) -> Wire | None:
    """A wire to the agent, if it answers there."""
    host, _, port = address.rpartition(":")
    try:
        with anyio.fail_after(_PATIENCE):
            stream = await anyio.connect_tcp(
                host,
                int(port),
                tls_hostname=host,
                ssl_context=ssl.create_default_context(),
                tls_standard_compatible=False,  # the link knows by itself whether it was cut
            )
            wire = StreamWire(stream, stream)
            try:
                await skip_to_marker(wire)
            except BaseException:
                await wire.aclose()
                raise
            return wire
    except (OSError, TimeoutError, LinkError, anyio.BrokenResourceError):
        return None
