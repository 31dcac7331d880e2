"""The datasets of a machine: fetched or put together in the user's cache, found by its kernels."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import msgspec

from mlinfra_sdk import errors, paths
from mlinfra_sdk.datasets.cache import Cache, check_path, key_of
from mlinfra_sdk.datasets.fetch import Order, Told
from mlinfra_sdk.datasets.local import File
from mlinfra_sdk.errors import MlinfraError, RequestError, StoreError
from mlinfra_sdk.objects.store import CHUNK_SIZE, ChunkStore, chunk_digest
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.files import Files
from mlinfra_sdk.worker.folder import Config
from mlinfra_sdk.worker.readers import packages_for

logger = logging.getLogger(__name__)

_InThread = m.UseDataset | m.OfferFiles | m.WriteFiles | m.FinishDataset

_TELL_EVERY = 0.5
_decode_told = msgspec.json.Decoder(Told).decode


class _Fetch:
    """A fetching process."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.told = Told()
        self.ended = anyio.Event()
        self.scope = anyio.CancelScope()


class Datasets:
    """What ``data=`` brings to one machine. ``links`` is the folder in which kernels find it."""

    def __init__(
        self,
        folder: Path,
        store: ChunkStore,
        config: Config,
        tasks: anyio.abc.TaskGroup,
        files: Files,
    ) -> None:
        self._files = files
        self.links = folder / "data"
        self._store = store
        self._config = config
        self._tasks = tasks
        self._fetches: dict[str, _Fetch] = {}
        self._uses: dict[str, int] = {}
        """Descriptors that keep versions in the cache, by the names of datasets."""
        self._expected: dict[str, list[bytes]] = {}
        """Parts of the store that were opened for each dataset."""

    @property
    def _cache(self) -> Cache:
        return Cache(paths.data_dir() / "datasets")

    async def do(self, request: m.AnyRequest) -> Any:
        """Answer a request about datasets."""
        match request:
            case m.FetchDataset():
                return self._start(request)
            case m.WatchDataset():
                return await self._watch(request.name)
            case m.DropDataset():
                fetch = self._fetches.pop(request.name, None)
                if fetch is not None:
                    fetch.scope.cancel()
            case m.LinkDataset():
                if not self._config.shared_fs:
                    raise RequestError("This machine does not share its folders.")
                self._link(request.name, Path(request.path))
            case m.UseDataset() | m.OfferFiles() | m.WriteFiles() | m.FinishDataset():
                return await anyio.to_thread.run_sync(self._do_in_thread, request)
        return None

    def _do_in_thread(self, request: _InThread) -> Any:
        with self._cache.fetching(request.key):  # two clients may bring the same at once
            return self._do_alone(request)

    def _do_alone(self, request: _InThread) -> Any:
        match request:
            case m.UseDataset():
                return self._use(request)
            case m.OfferFiles():
                missing = self._lacking(request)
                digests = [digest for file in missing for digest in file.chunks]
                self._cache.evict(sum(file.size for file in missing))
                self._expect(request.key, missing)
                return self._store.missing(digests)
            case m.WriteFiles():
                files = self._lacking(request)
                written: dict[bytes, Path] = {}
                for file in sorted(files, key=lambda it: len(it.chunks)):  # small ones may share
                    folder = self._cache.part(request.key, request.version)
                    self._write(folder, file, written.get(_name(file)))
                    written[_name(file)] = folder / file.path
                self._store.discard(digest for file in files for digest in file.chunks)
            case m.FinishDataset():
                self._cache.finish(request.key, request.version, request.files)
        return None

    # From a URL

    def _start(self, request: m.FetchDataset) -> m.DatasetState:
        fetch = self._fetches.get(request.name)
        if fetch is None or fetch.url != request.url:
            if fetch is not None:
                fetch.scope.cancel()
            fetch = self._fetches[request.name] = _Fetch(request.url)
            order = Order(request.url, str(self._cache.root), request.options)
            self._tasks.start_soon(self._fetch, fetch, order)
        return m.DatasetState(fetch.told.done, fetch.told.total)

    async def _watch(self, name: str) -> m.DatasetState:
        fetch = self._fetches.get(name)
        if fetch is None:
            raise RequestError(f"The dataset {name!r} is not being fetched.")
        with anyio.move_on_after(_TELL_EVERY):
            await fetch.ended.wait()
        told = fetch.told
        if not fetch.ended.is_set():
            return m.DatasetState(told.done, told.total)
        self._fetches.pop(name, None)
        if not told.version:
            reason = told.error or "Its fetching ended without a word."
            kind = getattr(errors, told.kind, StoreError)
            raise kind(reason, hint=told.hint)
        use = m.UseDataset(0, name, key_of(fetch.url), told.version, told.file)
        await anyio.to_thread.run_sync(self._use, use)
        return m.DatasetState(told.total, told.total, ready=True)

    async def _fetch(self, fetch: _Fetch, order: Order) -> None:
        command = [sys.executable, "-m", "mlinfra_sdk.datasets.fetch"]
        env = dict(os.environ)
        with fetch.scope:
            try:
                packages = await packages_for(fetch.url, paths.cache_dir() / "readers")
                if packages is not None:
                    env["PYTHONPATH"] = os.pathsep.join(
                        filter(None, [str(packages), env.get("PYTHONPATH")])
                    )
                async with await anyio.open_process(command, stderr=None, env=env) as process:
                    assert process.stdin is not None and process.stdout is not None
                    try:
                        await process.stdin.send(msgspec.msgpack.encode(order))
                        await process.stdin.aclose()
                        rest = b""
                        async for data in process.stdout:
                            *lines, rest = (rest + data).split(b"\n")
                            for line in lines:
                                fetch.told = _decode_told(line)
                    finally:
                        with suppress(ProcessLookupError):
                            process.kill()
            except RequestError as error:
                fetch.told = Told(error=error.message, hint=error.hint, kind="RequestError")
            except (OSError, anyio.BrokenResourceError, msgspec.DecodeError):
                logger.exception("A dataset could not be fetched")
        fetch.ended.set()

    # From files of the client

    def _lacking(self, request: m.OfferFiles | m.WriteFiles) -> list[File]:
        """Those of the files that are not there yet."""
        if self._cache.has(request.key, request.version):  # another client was faster
            return []
        entries = {file.path: file.entry() for file in request.files}
        missing = self._cache.begin(request.key, request.version, list(entries.values()))
        wanted = {entry.path for entry in missing}
        return [file for file in request.files if file.path in wanted]

    def _expect(self, key: str, files: list[File]) -> None:
        """Have what comes of large files put where it belongs; no more what came before them."""
        for name in self._expected.pop(key, []):
            self._store.parts.close(name)
        large = [file for file in files if len(file.chunks) > 1]
        older = self._cache.older(key, {file.path for file in large})
        self._expected[key] = [
            _name(file) for file in large if self._open(file, older.get(file.path))
        ]

    def _open(self, file: File, older: Path | None = None) -> bool:
        return self._store.parts.open(_name(file), file.chunks, file.size, CHUNK_SIZE, older)

    def _write(self, folder: Path, file: File, same: Path | None) -> None:
        """Put a file in place; ``same`` has the same content."""
        path = folder / check_path(file.path)
        partial = path.with_name(f".{secrets.token_hex(8)}.writing")  # its own may be too long
        part = None
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(partial, "wb") as out:
                os.fchmod(out.fileno(), 0o700 if file.executable else 0o600)
                if len(file.chunks) > 1:
                    self._open(file, same)  # unless it is: another client may have closed it
                    part = self._store.parts.take(_name(file))
                if part is None:
                    for digest in file.chunks:
                        out.write(self._store.read_chunk(digest))
                else:
                    for digest in set(file.chunks) - part.have:
                        if not part.put(digest, self._store.read_chunk(digest)):
                            raise StoreError(
                                f"{file.path!r} of the dataset was changed while it was read.",
                                hint="Run the cell again.",
                            )
                    part.move(out.fileno(), partial)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, MlinfraError):
                raise
            raise StoreError(
                f"The dataset's file {file.path!r} cannot be written: {error.strerror}.",
                hint="Ask for a machine with a larger disk, or name a smaller part of the data.",
            ) from error
        finally:
            if part is not None:
                part.close()

    # For the kernels

    def _use(self, request: m.UseDataset) -> bool:
        cache = self._cache
        if not cache.has(request.key, request.version):
            return False
        descriptor = cache.use(request.key, request.version)
        target = cache.version(request.key, request.version)
        if request.file:
            target = target / check_path(request.file)
        self._link(request.name, target)
        if request.link:
            path = check_path(request.link)
            if request.workspace:
                self._link_in_place(self._files.exclude(request.workspace, path), target)
            else:
                self._link_in_place(Path(self._config.cwd) / path, target)
        before = self._uses.get(request.name)
        self._uses[request.name] = descriptor
        if before is not None:
            os.close(before)
        return True

    def _link(self, name: str, target: Path) -> None:
        self.links.mkdir(mode=0o700, exist_ok=True)
        link = self.links / check_path(name)
        if link.parent != self.links:
            raise RequestError(f"{name!r} cannot be the name of a dataset.")
        _replace_link(link, target)

    def _link_in_place(self, link: Path, target: Path) -> None:
        """Under the path that it has beside the notebook, unless something else is there."""
        ours = link.is_symlink() and link.readlink().is_relative_to(self._cache.root)
        if ours or not os.path.lexists(link):
            link.parent.mkdir(parents=True, exist_ok=True)
            _replace_link(link, target)


def _name(file: File) -> bytes:
    """What a large file is called while it is put together."""
    return chunk_digest(b"".join(file.chunks))


def _replace_link(link: Path, target: Path) -> None:
    temporary = link.with_name(f".{secrets.token_hex(8)}.linking")
    temporary.symlink_to(target)
    temporary.replace(link)
