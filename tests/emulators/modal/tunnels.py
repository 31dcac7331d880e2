"""Tunnels: TLS on a port of loopback, plain TCP to a port of the sandbox."""

from __future__ import annotations

from modal_proto import api_pb2

from emulators.modal.box import Box


async def tunnels_of(box: Box) -> list[api_pb2.TunnelData]:
    """The ways to the open ports of a sandbox."""
    return []
