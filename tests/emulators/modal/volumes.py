"""Volumes (version 2): folders that outlive sandboxes, and the block store that fills them."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

BLOCK = 8 << 20
"""Bytes of a block, as the client cuts files."""


@dataclass(frozen=True)
class Volume:
    """A volume by its id and name."""

    id: str
    name: str
    folder: Path

    def path(self, path: str) -> Path:
        """The file of this name; one outside of the volume raises ValueError."""
        found = (self.folder / path.lstrip("/")).resolve()
        if not found.is_relative_to(self.folder.resolve()):
            raise ValueError(path)
        return found


class BlockStore:
    """An HTTP server for blocks. Each block is put at a URL of its own that nobody can guess."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir()
        self._puts: dict[str, bytes] = {}
        self._gets: dict[str, tuple[Path, int, int]] = {}
        self._runner: web.AppRunner | None = None
        self._url = ""

    async def start(self) -> None:
        """Listen on a free port of loopback."""
        app = web.Application(client_max_size=2 * BLOCK)
        app.router.add_put("/put/{ticket}", self._put)
        app.router.add_get("/get/{ticket}", self._get)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self._url = f"http://127.0.0.1:{port}"

    async def close(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    def has(self, digest: bytes) -> bool:
        """Whether the block is here."""
        return (self._folder / digest.hex()).exists()

    def read(self, digest: bytes) -> bytes:
        """The block."""
        return (self._folder / digest.hex()).read_bytes()

    def put_url(self, digest: bytes) -> str:
        """Where the block is to be put."""
        ticket = secrets.token_urlsafe()
        self._puts[ticket] = digest
        return f"{self._url}/put/{ticket}"

    def get_urls(self, path: Path, size: int) -> list[str]:
        """Where the blocks of a file are."""
        urls = []
        for start in range(0, size, BLOCK):
            ticket = secrets.token_urlsafe()
            self._gets[ticket] = (path, start, min(BLOCK, size - start))
            urls.append(f"{self._url}/get/{ticket}")
        return urls

    async def _put(self, request: web.Request) -> web.Response:
        digest = self._puts.get(request.match_info["ticket"])
        data = await request.read()
        if digest is None or hashlib.sha256(data).digest() != digest:
            raise web.HTTPBadRequest(text="this is not the block that was announced")
        (self._folder / digest.hex()).write_bytes(data)
        return web.Response(body=digest)

    async def _get(self, request: web.Request) -> web.Response:
        try:
            path, start, length = self._gets[request.match_info["ticket"]]
        except KeyError:
            raise web.HTTPNotFound from None
        with path.open("rb") as file:
            file.seek(start)
            return web.Response(body=file.read(length))
