"""The machine's side of workspaces: each notebook's folder has its twin here."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.objects.bulk import Source
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.sync.ignore import Rules
from mlinfra_sdk.sync.messages import (
    AnyMessage,
    Applied,
    Apply,
    Expect,
    List,
    Listing,
    Stage,
    Staged,
)
from mlinfra_sdk.sync.messages import decode as decode_message
from mlinfra_sdk.sync.placing import Placer, expect
from mlinfra_sdk.sync.staging import Stager
from mlinfra_sdk.sync.tree import Tree

FOLDER = "workspaces"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,80}")


class _Twin:
    """One workspace."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root = root
        self.tree = Tree(root, cache)
        self.rules = Rules()
        self.epoch = secrets.token_hex(8)
        """Names this record of changes: another agent's numbers mean something else."""
        self.lock = anyio.Lock()

    def list(self, request: List) -> Listing:
        if request.rules != list(self.rules.files.values()):
            self.rules = Rules(request.rules)
        self.tree.scan(self.rules, lazy_above=request.lazy_above, wanted=set(request.wanted))
        self.tree.fresh.clear()
        self.tree.save()
        whole = request.epoch != self.epoch
        entries, gone = self.tree.since(0 if whole else request.since)
        return Listing(
            str(self.root),
            self.epoch,
            self.tree.changes,
            whole,
            entries,
            [] if whole else gone,
            self.tree.skipped,
        )

    def apply(self, request: Apply, store: ChunkStore) -> Applied:
        before = self.tree.changes
        # The machine's disk is no safer than the machine: after a crash all is read again.
        problems = Placer(self.tree, store, durable=False).apply(request.changes)
        return Applied(problems, before, self.tree.changes)


class Files:
    """The workspaces of a machine, in ``folder``."""

    def __init__(self, folder: Path, store: ChunkStore) -> None:
        self.folder = folder / FOLDER
        self._cache = folder / "indexes"
        self._store = store
        self._twins: dict[str, _Twin] = {}
        self._stagers: dict[tuple[object, str], Stager] = {}
        self._expected: dict[tuple[object, str], set[bytes]] = {}
        """Parts of the store that are open for each client and workspace."""

    def _twin(self, name: str) -> _Twin:
        twin = self._twins.get(name)
        if twin is None:
            if _NAME.fullmatch(name) is None or name.startswith("."):
                raise RequestError(f"{name!r} is no name of a workspace.")
            root = self.folder / name
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            twin = self._twins[name] = _Twin(root, self._cache / name)
        return twin

    def exclude(self, name: str, path: str) -> Path:
        """Leave a path out of a workspace; gives where it is."""
        twin = self._twin(name)
        twin.tree.exclude(os.fsencode(path))
        return twin.root / path

    async def answer(self, client: object, body: bytes) -> Any:
        """Do what an encoded message of ``sync.messages`` asks for."""
        message: AnyMessage = decode_message(body)
        twin = self._twin(message.name)
        key = client, message.name
        if isinstance(message, Expect):  # also while what came before is being put in place
            return await anyio.to_thread.run_sync(self._expect, key, message)
        async with twin.lock:
            match message:
                case List():
                    self._close(key, self._expected.get(key, set()))
                    return await anyio.to_thread.run_sync(twin.list, message)
                case Apply():
                    try:
                        return await anyio.to_thread.run_sync(twin.apply, message, self._store)
                    finally:
                        self._close(key, {it.entry.digest for it in message.changes if it.entry})
                case Stage():
                    stager = self._stagers.setdefault(key, Stager(twin.tree))
                    return Staged(*await anyio.to_thread.run_sync(stager.stage, message.wants))

    def _expect(self, key: tuple[object, str], request: Expect) -> list[bytes]:
        opened = expect(self._store, request.files)
        self._expected.setdefault(key, set()).update(opened)
        return self._store.missing(request.digests)

    def _close(self, key: tuple[object, str], digests: Iterable[bytes]) -> None:
        """Those parts are not going to be taken; what is in them stays for later."""
        expected = self._expected.get(key, set())
        for digest in expected.intersection(digests):
            expected.discard(digest)
            self._store.parts.close(digest)

    def source(self, client: object) -> Source:
        """What this client fetches from: the files that it has had staged, and the store."""
        stagers = [stager for (owner, _), stager in self._stagers.items() if owner is client]
        return _Sources(stagers, self._store) if stagers else self._store

    def forget(self, client: object) -> None:
        """A client has gone."""
        for key in [key for key in self._stagers if key[0] is client]:
            del self._stagers[key]
        for key in [key for key in self._expected if key[0] is client]:
            self._close(key, self._expected[key])
            del self._expected[key]


class _Sources:
    """Staged files, and behind them the store."""

    def __init__(self, stagers: list[Stager], store: ChunkStore) -> None:
        self._stagers = stagers
        self._store = store

    def read_chunk(self, digest: bytes, *, verify: bool = True) -> bytes:
        for stager in self._stagers:
            if stager.size(digest):
                return stager.read_chunk(digest, verify=verify)
        return self._store.read_chunk(digest, verify=verify)

    def size(self, digest: bytes) -> int:
        return next(filter(None, (it.size(digest) for it in self._stagers)), 0) or (
            self._store.size(digest)
        )
