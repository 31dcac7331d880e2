"""Tunnels: TLS on a port of this computer, and behind it the port of a sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

import trustme
from modal_proto import api_pb2

HOST = "127.0.0.1"
_PIECE = 1 << 16


class Tunnels:
    """The service's side of all tunnels. Clients trust it by ``authority``."""

    def __init__(self, folder: Path) -> None:
        issuer = trustme.CA()
        self.authority = folder / "authority.pem"
        issuer.cert_pem.write_to_path(str(self.authority))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        issuer.issue_cert(HOST).configure_cert(self._context)
        self._servers: list[asyncio.Server] = []
        self._streams: set[asyncio.StreamWriter] = set()
        self.closed = False
        """Whether they lead nowhere, as behind a firewall that lets nothing through."""

    async def open(self, port: int) -> api_pb2.TunnelData:
        """A tunnel to a port, on which something may listen later."""

        async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._streams.add(writer)
            try:
                if self.closed:
                    return
                inner = await asyncio.open_connection(HOST, port)
                self._streams.add(inner[1])
                both = [_copy(reader, inner[1]), _copy(inner[0], writer)]
                await asyncio.gather(*both)
            except OSError:
                pass  # nothing listens there
            finally:
                writer.transport.abort()
                self._streams.discard(writer)

        server = await asyncio.start_server(forward, HOST, 0, ssl=self._context)
        self._servers.append(server)
        return api_pb2.TunnelData(
            host=HOST, port=server.sockets[0].getsockname()[1], container_port=port
        )

    def cut(self) -> int:
        """End all connections; gives their number."""
        streams, self._streams = self._streams, set()
        for stream in streams:
            stream.transport.abort()
        return len(streams)

    def close(self) -> None:
        """End everything."""
        for server in self._servers:
            server.close()
        self.cut()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(_PIECE):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()
