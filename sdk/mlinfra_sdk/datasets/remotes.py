"""Where datasets come from: what is there, and its bytes."""

from __future__ import annotations

import http.client
import importlib
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from mlinfra_sdk.datasets.cache import Entry, check_path
from mlinfra_sdk.errors import MlinfraError, RequestError, StoreError
from mlinfra_sdk.sources import EXTRAS

_PIECE = 8 << 20
_THREADS = 8
_PATIENCE_S = 60.0
_TRIES = 5
_PAUSE_S = 0.5
_MARKS = (
    *("VersionId", "ETag", "etag", "md5Hash", "generation", "blob_id", "sha256"),
    *("Content-MD5", "LastModified", "Last-Modified", "last_modified", "updated", "mtime"),
)
"""What file systems say of a file that changes with its content, the surest first."""


class Remote(Protocol):
    """A file or a folder somewhere else. Errors are as they come; see :func:`explained`."""

    is_file: bool

    def listing(self) -> list[tuple[Entry, str]]:
        """All files, each with its name over there."""
        ...

    def pieces(self, name: str, start: int, size: int) -> Iterator[bytes]:
        """The rest of a file of this size, in order."""
        ...


def open_remote(url: str, options: dict[str, Any]) -> Remote:
    """The place that a URL names."""
    if urlsplit(url).scheme in ("http", "https"):
        return _Http(url)
    return _Filesystem(url, options)


class _Http:
    """One file of a web server, by the standard library; goes on after a cut by itself."""

    is_file = True

    def __init__(self, url: str) -> None:
        self._url = url
        self._tag = ""
        """Of the content that is listed, unless that may have another one with the same tag."""

    def listing(self) -> list[tuple[Entry, str]]:
        with self._request("HEAD", {}) as reply:
            size = reply.headers.get("Content-Length")
            tag = reply.headers.get("ETag", "")
            self._tag = tag if tag.startswith('"') else ""
            found = ((key, reply.headers.get(key)) for key in _MARKS)
            mark = next((f"{key}={value}" for key, value in found if value), "")
        if size is None:
            raise StoreError(f"The server does not tell the size of {self._url}.")
        name = unquote(urlsplit(self._url).path).rstrip("/").rpartition("/")[2]
        return [(Entry(check_path(name or "index.html"), int(size), mark), self._url)]

    def pieces(self, name: str, start: int, size: int) -> Iterator[bytes]:
        tries = 0
        same = {"If-Range": self._tag} if self._tag else {}
        while start < size:
            try:
                with self._request("GET", {"Range": f"bytes={start}-", **same}) as reply:
                    if self._tag and reply.headers.get("ETag", self._tag) != self._tag:
                        raise StoreError(
                            f"{self._url} is being changed.", hint="Run the cell again."
                        )
                    skip = start if reply.status == 200 else 0  # it does not take ranges
                    while piece := reply.read(_PIECE):
                        rest = piece[min(skip, len(piece)) :]
                        skip -= len(piece) - len(rest)
                        start += len(rest)
                        if rest:
                            tries = 0
                            yield rest
                if start < size:
                    raise http.client.IncompleteRead(b"", size - start)
            except urllib.error.HTTPError:
                raise
            except (OSError, http.client.HTTPException):
                tries += 1
                if tries == _TRIES:
                    raise
                time.sleep(_PAUSE_S * tries)

    def _request(self, method: str, headers: dict[str, str]) -> Any:
        request = urllib.request.Request(
            self._url,
            method=method,
            headers={"Accept-Encoding": "identity", "User-Agent": "mlinfra-sdk", **headers},
        )
        return urllib.request.urlopen(request, timeout=_PATIENCE_S)


class _Filesystem:
    """What fsspec opens: an object or all objects below a prefix, several requests at a time."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        scheme = urlsplit(url).scheme
        extra, package = EXTRAS[scheme]
        try:
            importlib.import_module(package)
            fsspec = importlib.import_module("fsspec.core")
        except ImportError as error:
            raise RequestError(
                f"{scheme}:// needs the package {error.name or package} on the machine.",
                hint=f"Install it there: pip install mlinfra-sdk[{extra}].",
            ) from None
        if scheme == "s3" and not {"key", "anon"} & options.keys():
            session = importlib.import_module("botocore.session").get_session()
            options = {**options, "anon": session.get_credentials() is None}
        self.is_file = False
        self._filesystem, self._path = fsspec.url_to_fs(url, skip_instance_cache=True, **options)

    def listing(self) -> list[tuple[Entry, str]]:
        info = self._filesystem.info(self._path)
        self.is_file = info["type"] == "file"
        if self.is_file:
            return [(_entry(self._path.rstrip("/").rpartition("/")[2], info), self._path)]
        root = self._path.rstrip("/") + "/"
        found = self._filesystem.find(self._path, detail=True)
        return [
            (_entry(name.removeprefix(root), details), name)
            for name, details in sorted(found.items())
            if details.get("type") == "file" and not name.endswith("/")
        ]

    def pieces(self, name: str, start: int, size: int) -> Iterator[bytes]:
        def read(offset: int) -> bytes:
            end = min(offset + _PIECE, size)
            data = bytes(self._filesystem.cat_file(name, start=offset, end=end))
            if len(data) != end - offset:
                raise StoreError(f"A piece of {name} has {len(data)} bytes, not {end - offset}.")
            return data

        offsets = iter(range(start, size, _PIECE))
        with ThreadPoolExecutor(_THREADS) as pool:
            waiting = [pool.submit(read, offset) for offset in islice(offsets, _THREADS)]
            while waiting:
                piece = waiting.pop(0).result()
                waiting += [pool.submit(read, offset) for offset in islice(offsets, 1)]
                yield piece


def _entry(name: str, info: dict[str, Any]) -> Entry:
    mark = next((f"{key}={info[key]}" for key in _MARKS if info.get(key)), "")
    return Entry(check_path(name), int(info["size"]), mark)


def explained(error: Exception, url: str) -> MlinfraError:
    """What a user can do about an error of a remote place."""
    if isinstance(error, MlinfraError):
        return error
    text = str(error).strip() or type(error).__name__
    status = error.code if isinstance(error, urllib.error.HTTPError) else 0
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return RequestError(f"There is nothing at {url}.", hint="Check the spelling.")
    if isinstance(error, PermissionError) or status in (401, 403) or _REFUSED.search(text):
        return RequestError(
            f"{url} may not be read: {text}.",
            hint="Yours are sent to the machine only with data_credentials=yes; check that they "
            "allow it.",
        )
    return StoreError(f"{url} could not be fetched: {text}.", hint="Run the cell again to go on.")


_REFUSED = re.compile(
    "access ?denied|bad request|credential|forbidden|invalidaccesskey|signature", re.IGNORECASE
)
