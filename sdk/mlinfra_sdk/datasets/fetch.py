"""``python -m mlinfra_sdk.datasets.fetch``: one dataset from its URL into the machine's cache.

A process of its own, so that a fetch can be ended at any instant, and credentials, which come by
stdin, are gone with it. Tells its progress on stdout, a JSON object a line.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from mlinfra_sdk.datasets.cache import Cache, Entry, key_of, version_of
from mlinfra_sdk.datasets.remotes import Remote, explained, open_remote
from mlinfra_sdk.errors import MlinfraError, RequestError, StoreError

_MD5 = re.compile('[eE][tT]ag="?([0-9a-f]{32})"?')


class Order(msgspec.Struct):
    """What is to be fetched; ``options`` are those of the file system, with credentials."""

    url: str
    root: str
    options: dict[str, Any] = {}


class Told(msgspec.Struct, omit_defaults=True):
    """A line of the fetching process. ``version`` or ``error`` come last; ``file`` is the name of
    the one file that the URL is, unless it is a folder."""

    done: int = 0
    total: int = 0
    version: str = ""
    file: str = ""
    error: str = ""
    hint: str = ""
    kind: str = ""
    """Of the error: the name of its class."""


def fetch(order: Order, tell: Callable[[Told], None]) -> Told:
    """Bring the present version of a dataset into the cache; gives its name there. A fetch that
    was ended is gone on with."""
    try:
        remote = open_remote(order.url, order.options)
        entries = remote.listing()
    except Exception as error:
        raise explained(error, order.url) from error
    if not entries:
        raise RequestError(f"There is nothing at {order.url}.", hint="Check the spelling.")
    cache, key = Cache(Path(order.root)), key_of(order.url)
    listed = [entry for entry, _ in entries]
    version = version_of(listed)
    file = listed[0].path if remote.is_file else ""
    with cache.fetching(key):
        if cache.has(key, version):
            return Told(version=version, file=file)
        missing = {entry.path for entry in cache.begin(key, version, listed)}
        total = sum(entry.size for entry in listed if entry.path in missing)
        part = cache.part(key, version)
        cache.evict(total - sum(_have(part / path) for path in missing))
        done = 0
        tell(Told(done, total))

        def moved(size: int) -> None:
            nonlocal done
            done += size
            tell(Told(done, total))

        for entry, name in entries:
            if entry.path in missing:
                _fetch_file(remote, name, part / entry.path, entry, moved, order.url)
        cache.finish(key, version, listed)
    return Told(total, total, version, file)


def _fetch_file(
    remote: Remote, name: str, path: Path, entry: Entry, moved: Callable[[int], None], url: str
) -> None:
    """Go on with a file where an earlier try was cut."""
    partial = _partial(path)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(partial, "ab") as file:
        have = file.tell()
        if have > entry.size or not entry.mark:
            have = 0
            file.truncate(0)
        moved(have)
        for piece in _explaining(remote.pieces(name, have, entry.size), url):
            file.write(piece)
            file.flush()
            moved(len(piece))
        size = file.tell()
    if size != entry.size or not _is_right(partial, entry):
        partial.unlink()
        raise StoreError(
            f"{entry.path!r} of {url} did not arrive as it should.",
            hint="It was damaged on its way, or is being changed; run the cell again.",
        )
    partial.replace(path)


def _partial(path: Path) -> Path:
    """Where a file is while it is fetched; its own name may be too long to have more added."""
    name = blake3(os.fsencode(path.name)).hexdigest(8)
    return path.with_name(f".{name}.fetching")


def _have(path: Path) -> int:
    """Bytes of a file that an earlier try has fetched."""
    try:
        return _partial(path).stat().st_size
    except OSError:
        return 0


def _explaining(pieces: Iterator[bytes], url: str) -> Iterator[bytes]:
    try:
        yield from pieces
    except Exception as error:
        raise explained(error, url) from error


def _not_stored(error: OSError) -> StoreError:
    return StoreError(
        f"A dataset cannot be stored on the machine: {error.strerror}.",
        hint="Ask for a machine with a larger disk, or name a smaller part of the data.",
    )


def _is_right(path: Path, entry: Entry) -> bool:
    """By the checksum, where the mark is one."""
    match = _MD5.fullmatch(entry.mark)
    if match is None:
        return True
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == match[1]


def main() -> None:
    """Takes an :class:`Order` from stdin."""
    order = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Order)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print does not belong there

    def tell(told: Told) -> None:
        out.write(msgspec.json.encode(told) + b"\n")
        out.flush()

    try:
        try:
            tell(fetch(order, tell))
        except OSError as error:
            raise error if isinstance(error, MlinfraError) else _not_stored(error) from error
    except MlinfraError as error:
        tell(Told(error=error.message, hint=error.hint, kind=type(error).__name__))


if __name__ == "__main__":
    main()
