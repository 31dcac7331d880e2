"""Checkpoints in an object store, by fsspec: ``URL/NAME/chunks/…`` and ``URL/NAME/….ckpt``.

An object appears whole or not at all, and a manifest is written after its chunks. One training run
at a time writes a name. Every request has a bounded time, its retries included: where nothing
answers, s3fs tries five times what botocore tries five times for 15 s.
"""

from __future__ import annotations

import importlib
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from mlinfra_sdk import units
from mlinfra_sdk.checkpoints.keep import Keep
from mlinfra_sdk.checkpoints.manifest import Manifest, decode, encode
from mlinfra_sdk.checkpoints.store import CheckpointStore
from mlinfra_sdk.errors import CheckpointError, ChunkMissing, RequestError, StoreError
from mlinfra_sdk.objects.store import ChunkStore, chunk_digest

_THREADS = 8
PATIENCE_S = 120.0
"""For one request, with its retries. Eight threads send chunks of 4 MiB, so that a link of 3 Mbit/s
is still quick enough."""
_EXTRAS = {"s3": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az"}


class Mirror:
    """The checkpoints of ``name`` below ``url``."""

    def __init__(self, url: str, name: str, options: dict[str, Any]) -> None:
        scheme = urlsplit(url).scheme
        if scheme not in _EXTRAS and scheme not in ("file", "memory"):
            raise RequestError(
                f"to={url!r} is no place for checkpoints.",
                hint="Write s3://bucket/path, gs://bucket/path or az://container/path.",
            )
        if urlsplit(url).password:
            raise RequestError(
                "A URL for checkpoints must not hold a password.",
                hint="Give it in the environment, or by storage_options.",
            )
        try:
            fsspec = importlib.import_module("fsspec.core")
            self._files, root = fsspec.url_to_fs(url, skip_instance_cache=True, **options)
        except ImportError as error:
            raise RequestError(
                f"{scheme}:// needs the package {error.name or 'fsspec'}.",
                hint=f"Install it: pip install mlinfra-sdk[{_EXTRAS.get(scheme, 's3')}].",
            ) from None
        self._has_folders = scheme == "file"
        self.url = f"{url.rstrip('/')}/{name}"
        self._root = f"{root.rstrip('/')}/{name}"
        self._name = name
        self._known: set[bytes] | None = None
        self._unread = False

    def push(self, manifest: Manifest, chunks: ChunkStore, keep: Keep) -> None:
        """Copy a checkpoint there, of which only new chunks travel, and prune, unless what is there
        could not be read before: then this run may have begun anew for that reason, and does not
        remove what it should have gone on from. Raises :class:`StoreError`."""
        try:
            if self._known is None:
                self._known = self._chunks()
            known = self._known
            new = [digest for digest in manifest.chunks() if digest not in known]
            self._each(
                lambda digest: self._put(self._chunk(digest), chunks.read_chunk(digest)), new
            )
            known.update(new)
            self._put(self._path(_name(manifest)), encode(manifest))
            if not self._unread:
                self._prune(keep)
        except Exception as error:
            self._known = None  # some of it may be there
            if isinstance(error, StoreError):
                raise
            raise self._failed("written", error) from error

    def pull(self, store: CheckpointStore) -> None:
        """Bring the newest usable checkpoint into ``store`` if that has none as new. Raises
        :class:`StoreError` if the place cannot be read."""
        self._unread = True
        try:
            local = store.latest(self._name, lambda text: None)
            for manifest in reversed(self._manifests(warn=True)):
                if local is not None and manifest.created <= local.created:
                    break
                try:
                    self._bring(manifest, store.chunks)
                except (CheckpointError, FileNotFoundError):
                    self._left_out(str(manifest))
                    continue
                store.commit(manifest)
                break
            self._unread = False
        except StoreError:
            raise
        except Exception as error:
            raise self._failed("read", error) from error

    def _bring(self, manifest: Manifest, chunks: ChunkStore) -> None:
        def bring(digest: bytes) -> None:
            data = self._call("cat_file", self._chunk(digest))
            if chunk_digest(data) != digest:
                raise CheckpointError(f"A chunk of {manifest} is damaged at {self.url}.")
            chunks.put_chunk(data, digest)

        self._each(bring, chunks.missing(manifest.chunks()))

    def _prune(self, keep: Keep) -> None:
        whole = self._manifests()
        doomed = keep.doomed(whole)
        if not doomed:
            return
        for manifest in doomed:
            self._call("rm_file", self._path(_name(manifest)))
        wanted = {digest for it in whole if it not in doomed for digest in it.chunks()}
        known = self._known or set()
        self._each(lambda digest: self._call("rm_file", self._chunk(digest)), list(known - wanted))
        self._known = known & wanted

    def _each(self, act: Any, digests: list[bytes]) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(act, digests))

    def _put(self, path: str, data: bytes) -> None:
        if self._has_folders:
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._call("pipe_file", path, data)

    def _names(self, folder: str) -> list[str]:
        self._files.invalidate_cache()
        try:
            return [str(path).rpartition("/")[2] for path in self._call("ls", folder, detail=False)]
        except FileNotFoundError:
            return []

    def _manifests(self, warn: bool = False) -> list[Manifest]:
        """All whole ones, oldest first: a run that began anew elsewhere counts from 1 again."""
        whole = []
        for name in self._names(self._root):
            if name.endswith(".ckpt"):
                try:
                    whole.append(decode(self._call("cat_file", self._path(name))))
                except FileNotFoundError:  # pruned just now
                    continue
                except CheckpointError:
                    if warn:
                        self._left_out(name)
        return sorted(whole, key=lambda it: it.created)

    def _left_out(self, what: str) -> None:
        warnings.warn(
            f"Checkpoint {what} at {self.url} is left out: it is damaged.",
            RuntimeWarning,
            stacklevel=4,
        )

    def _chunks(self) -> set[bytes]:
        names = self._names(f"{self._root}/chunks")
        return {bytes.fromhex(name) for name in names if len(name) == 64}

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        if getattr(self._files, "async_impl", False):
            options["timeout"] = PATIENCE_S
        return getattr(self._files, method)(*arguments, **options)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _chunk(self, digest: bytes) -> str:
        return f"{self._root}/chunks/{digest.hex()}"

    def _failed(self, done: str, error: Exception) -> StoreError:
        text = str(error).strip() or type(error).__name__
        if isinstance(error, ChunkMissing):
            text = error.message
        elif isinstance(error, TimeoutError) or type(error).__name__ == "FSTimeoutError":
            text = f"no answer for {units.format_duration(PATIENCE_S)}"
        return StoreError(
            f"Checkpoints at {self.url} could not be {done}: {text.rstrip('.')}.",
            hint="Check the credentials and that the bucket exists.",
        )


def _name(manifest: Manifest) -> str:
    """Nothing is ever written over: two machines may have made one number."""
    return f"{manifest.number:08d}-{manifest.id}.ckpt"
