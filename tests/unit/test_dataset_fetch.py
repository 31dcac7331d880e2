"""Datasets from web servers that do not behave."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from mlinfra_sdk.datasets import remotes
from mlinfra_sdk.datasets.cache import Cache, key_of
from mlinfra_sdk.datasets.fetch import Order, Told, fetch
from mlinfra_sdk.errors import StoreError


class Cutting(http.server.BaseHTTPRequestHandler):
    """Knows no ranges, and cuts each answer after half of it."""

    asked: ClassVar[int] = 0

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()

    def do_GET(self) -> None:
        Cutting.asked += 1
        self.do_HEAD()
        self.wfile.write(b"x" * 50)


class Changing(http.server.BaseHTTPRequestHandler):
    """Has another content, of the same size, once half of the first one is out."""

    content: ClassVar[bytes] = b"1" * 100
    heeds_conditions: ClassVar[bool] = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._head(0, whole=True)

    def do_GET(self) -> None:
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        whole = self.heeds_conditions and self.headers["If-Range"] != self._tag()
        start = 0 if whole else start
        self._head(start, whole)
        self.wfile.write(self.content[start : 50 if self.content[:1] == b"1" else 100])
        Changing.content = b"2" * 100

    def _tag(self) -> str:
        return f'"{self.content[:1].decode()}"'

    def _head(self, start: int, whole: bool) -> None:
        self.send_response(200 if whole else 206)
        self.send_header("Content-Length", str(100 - start))
        self.send_header("ETag", self._tag())
        self.end_headers()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remotes, "_PAUSE_S", 0.01)


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), request.param) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/f.bin"
        server.shutdown()


def bring(url: str, root: Path) -> bytes:
    told = fetch(Order(url, str(root)), lambda told: None)
    return (Cache(root).version(key_of(url), told.version) / told.file).read_bytes()


@pytest.mark.parametrize("url", [Cutting], indirect=True)
def test_a_server_that_always_cuts_at_the_same_place(url: str, tmp_path: Path) -> None:
    Cutting.asked = 0
    with pytest.raises(StoreError, match="could not be fetched"):
        bring(url, tmp_path)
    assert Cutting.asked == 5


@pytest.mark.parametrize("url", [Changing], indirect=True)
@pytest.mark.parametrize("heeds", [True, False])
def test_a_file_that_is_changed_while_it_is_fetched(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heeds: bool
) -> None:
    monkeypatch.setattr(Changing, "content", b"1" * 100)
    monkeypatch.setattr(Changing, "heeds_conditions", heeds)
    with pytest.raises(StoreError, match="being changed"):
        bring(url, tmp_path)
    assert bring(url, tmp_path) == b"2" * 100


@pytest.mark.parametrize("url", [Changing], indirect=True)
def test_what_has_been_fetched_needs_no_more_room(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Changing, "content", b"2" * 100)
    needed: list[int] = []
    monkeypatch.setattr(Cache, "evict", lambda self, size: needed.append(size))

    def end(told: Told) -> None:
        if told.done:
            raise KeyboardInterrupt

    monkeypatch.setattr(remotes, "_PIECE", 30)
    with pytest.raises(KeyboardInterrupt):
        fetch(Order(url, str(tmp_path)), end)
    assert bring(url, tmp_path) == b"2" * 100
    assert needed == [100, 70]
