"""Checkpoints that the user's own code writes into a folder: ``checkpoints=outputs/``.

A thread beside the run looks at the folder each second. What is complete becomes a checkpoint of
its own kind, whose files are kept by content, and leaves the machine as others do. A run that was
cut off finds the files again on its next machine.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blake3 import blake3

from mlinfra_sdk import units
from mlinfra_sdk.checkpoints import announce
from mlinfra_sdk.checkpoints.export import write_file
from mlinfra_sdk.checkpoints.keep import Keep
from mlinfra_sdk.checkpoints.manifest import File, Manifest
from mlinfra_sdk.checkpoints.store import CheckpointStore
from mlinfra_sdk.errors import CheckpointError, StoreError
from mlinfra_sdk.objects.blob import CHUNK_SIZE, BlobRef

EVERY = 1.0
"""Seconds between two looks."""
_KEEP = Keep(last=2)
_MOST = 20_000
"""Files above which a folder is none of checkpoints."""
_UNFINISHED = re.compile(r"^\.(?!metadata$)|~$|\.(tmp|temp|part|partial|lock|incomplete|swp)$")
"""By name. The ``.metadata`` of torch.distributed.checkpoint is no hidden file of a writer."""
_TRAINER = re.compile(r"(^|/)checkpoint-\d+$")
_NICE = 10

Look = tuple[int, int]
"""Size, and time of the last change in nanoseconds."""


def name_of(workspace: str, path: str) -> str:
    """The name of the checkpoints of a folder of a workspace."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", path).strip("-._")[:60] or "folder"
    return f"{slug}-{blake3(f'{workspace}/{path}'.encode()).hexdigest(length=4)}"


@contextmanager
def watched(name: str, path: str) -> Iterator[None]:
    """While a run goes on, keep what is complete in the folder ``path`` of the working directory.
    Before it, what a run that was cut off has left is put there."""
    root = Path.cwd().resolve()
    folder = (root / path).resolve()
    if not folder.is_relative_to(root) or folder == root:
        warnings.warn(
            f"checkpoints={path} leads out of the notebook's folder: it is not watched.",
            RuntimeWarning,
            stacklevel=3,
        )
        yield
        return
    watch = FolderWatch(name, path, folder, CheckpointStore.default())
    watch.restore()
    watch.start()
    try:
        yield
    finally:
        watch.stop()


class FolderWatch:
    """One folder during one run."""

    def __init__(self, name: str, path: str, folder: Path, store: CheckpointStore) -> None:
        self._name, self._path, self._folder, self._store = name, path, folder, store
        self._files: dict[str, File] = {}
        """The content of the last checkpoint, by path."""
        self._seen: dict[str, Look] = {}
        self._count = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mlinfra-folder", daemon=True)
        self._warned = ""

    def restore(self) -> None:
        """Put files of a run that was cut off where they were, unless there are such."""
        announce.wanted(self._store, self._name)
        manifest = self._store.latest(self._name)
        if manifest is None or (manifest.finished and not announce.again()):
            return
        written = 0
        for file in manifest.files:
            target = self._folder / file.path
            if target.exists():
                continue
            try:
                write_file(file, self._store.chunks, self._folder)
            except (OSError, CheckpointError) as error:
                self._warn(f"{self._path}/{file.path} was not restored: {error}")
            else:
                written += 1
        if written:
            age = units.format_duration(time.time() - manifest.created)
            files = "1 file" if written == 1 else f"{written} files"
            print(f"{files} of {self._path} restored, as of {age} ago.", flush=True)

    def start(self) -> None:
        """Begin to look. What is there already is the beginning."""
        self._seen = self._look()
        self._thread.start()

    def stop(self) -> None:
        """The run is over: nothing is being written any more."""
        self._over.set()
        self._thread.join()
        now = self._look()
        self._keep(self._whole(now, now), finished=True)

    def _watch(self) -> None:
        with suppress(OSError, AttributeError):  # of this thread alone, on Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while not self._over.wait(EVERY):
            self.tick()

    def tick(self) -> None:
        """Look once: what has not changed since the look before is not being written."""
        now = self._look()
        steady = {path: look for path, look in now.items() if self._seen.get(path) == look}
        self._seen = now
        self._keep(self._whole(now, steady), finished=False)

    def _whole(self, now: dict[str, Look], steady: dict[str, Look]) -> dict[str, Look]:
        """What can be kept: a folder in the folder (``checkpoint-500``) only as a whole."""
        begun = _begun(now)
        moving = {path.split("/")[0] for path in now if path not in steady and "/" in path}
        moving |= {folder.split("/")[0] for folder in begun}
        return {
            path: look
            for path, look in steady.items()
            if path.split("/")[0] not in moving and path.rpartition("/")[0] not in begun
        }

    def _look(self) -> dict[str, Look]:
        """Files that are there, but for those whose names say that they are not finished."""
        found: dict[str, Look] = {}
        for folder, folders, names in os.walk(self._folder):
            folders[:] = [it for it in folders if not it.startswith(".")]
            for name in names:
                if _UNFINISHED.search(name):
                    continue
                path = Path(folder, name)
                try:
                    status = path.lstat()
                except OSError:
                    continue
                if os.path.islink(path) or not os.path.isfile(path):
                    continue
                relative = path.relative_to(self._folder).as_posix()
                found[relative] = (status.st_size, status.st_mtime_ns)
        if len(found) > _MOST:
            self._warn(f"checkpoints={self._path} has more than {_MOST} files: it is not kept.")
            return {}
        return found

    def _keep(self, looks: dict[str, Look], *, finished: bool) -> None:
        """Make a checkpoint of these files, if it is another one than the last."""
        there = set(looks)
        if not finished:  # what is being written again keeps its last state
            there |= {path for path in self._files if path in self._seen}
        files: dict[str, File] = {}
        try:
            for path in sorted(there):
                known = self._files.get(path)
                look = looks.get(path)
                if known is not None and look in (None, (known.size, known.mtime)):
                    files[path] = known
                elif look is not None:
                    file = self._read(path, look)
                    if file is not None:
                        files[path] = file
                    elif known is not None:
                        files[path] = known
            changed = files != self._files
            if finished:
                if not (self._count or files):
                    return
            elif not (changed and files):  # who removes the last one is about to write the next
                return
            self._count += 1
            manifest = Manifest(
                self._name,
                0,
                secrets.token_hex(8),
                time.time(),
                self._count,
                finished,
                files=list(files.values()),
                folder=self._path,
            )
            manifest = self._store.commit(manifest, _KEEP)
        except (StoreError, OSError) as error:
            self._warn(f"The files of {self._path} were not kept: {error}")
            return
        self._files = files
        announce.saved(manifest, _KEEP)

    def _read(self, path: str, look: Look) -> File | None:
        """The file by content; None if it is not complete, or changes meanwhile."""
        chunks = []
        full = self._folder / path
        try:
            if not _complete(full, look[0]):
                return None
            with open(full, "rb") as source:
                while data := source.read(CHUNK_SIZE):
                    chunks.append(self._store.chunks.put_chunk(data))
            status = full.stat()
        except FileNotFoundError:
            return None
        if (status.st_size, status.st_mtime_ns) != look:
            return None
        return File(path, look[0], look[1], BlobRef(look[0], chunks))

    def _warn(self, text: str) -> None:
        if text != self._warned:
            self._warned = text
            print(f"Warning: {text}", flush=True)


def _begun(paths: Iterable[str]) -> set[str]:
    """Folders without the file that their libraries write last, between two files of which minutes
    can pass: those of Hugging Face's Trainer and of torch.distributed.checkpoint."""
    folders: dict[str, set[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, set()).add(name)
    return {
        folder
        for folder, names in folders.items()
        if (
            _TRAINER.search(folder)
            and "training_args.bin" in names
            and "trainer_state.json" not in names
        )
        or (".metadata" not in names and any(it.endswith(".distcp") for it in names))
    }


def _complete(path: Path, size: int) -> bool:
    """Whether a file of a format that tells is whole: those of torch (zip) and safetensors."""
    with open(path, "rb") as file:
        start = file.read(8)
    if start[:4] == b"PK\x03\x04":
        return zipfile.is_zipfile(path)
    if path.suffix == ".safetensors":
        return len(start) == 8 and _safetensors_size(path, int.from_bytes(start, "little")) == size
    return True


def _safetensors_size(path: Path, header: int) -> int:
    """What the header says that the file has."""
    import msgspec

    if not 0 < header < 100_000_000:
        return -1
    with open(path, "rb") as file:
        file.seek(8)
        try:
            entries = msgspec.json.decode(file.read(header))
        except msgspec.DecodeError:
            return -1
    ends = [it["data_offsets"][1] for name, it in entries.items() if name != "__metadata__"]
    return 8 + header + max(ends, default=0)
