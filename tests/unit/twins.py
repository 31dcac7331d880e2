"""A notebook's folder and its twin on a machine, with both sides' real code and no link between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio.from_thread
import msgspec

from mlinfra_sdk.errors import StoreError
from mlinfra_sdk.objects.bulk import Source
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.sync import messages
from mlinfra_sdk.sync.reports import Report
from mlinfra_sdk.sync.workspace import Workspace
from mlinfra_sdk.worker.files import Files

T = TypeVar("T")


class Done:
    """A transfer that is over as soon as it has begun."""

    def __init__(self, total: int, error: StoreError | None = None) -> None:
        self.total = total
        self._error = error

    def wait(self, progress: Callable[[int, int], None]) -> None:
        progress(0, self.total)
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """There is nothing left to be cancelled."""


class Direct:
    """A peer that is the machine's side itself; what passes is encoded as on a link."""

    def __init__(self, files: Files, there: ChunkStore, here: ChunkStore, portal: Any) -> None:
        self.files, self.store_there, self.store_here = files, there, here
        self._portal = portal
        self.sent = 0
        self.received = 0
        self.asked = 0
        self.before: Callable[[messages.AnyMessage], None] = lambda message: None

    def ask(self, message: messages.AnyMessage, kind: type[T]) -> T:
        self.asked += 1
        self.before(message)
        answer = self._portal.call(self.files.answer, self, messages.encode(message))
        return msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=kind)

    def begin(self, message: messages.AnyMessage, kind: type[T]) -> Future[T]:
        answer: Future[T] = Future()
        try:
            answer.set_result(self.ask(message, kind))
        except Exception as error:
            answer.set_exception(error)
        return answer

    def upload(
        self, digests: list[bytes], source: Source, expect: messages.Expect | None = None
    ) -> Done:
        if expect is not None:
            missing = self.ask(expect, list[bytes])
        else:
            missing = self.store_there.missing(digests)
        before = self.sent
        for digest in missing:
            try:
                data = source.read_chunk(digest)
            except StoreError as error:
                return Done(self.sent - before, error)
            self.sent += len(data)
            assert self.store_there.put_chunk(data) == digest
        return Done(self.sent - before)

    def download(self, digests: list[bytes], progress: Callable[[int, int], None]) -> None:
        for digest in self.store_here.missing(digests):
            data = self.files.source(self).read_chunk(digest)
            self.received += len(data)
            assert self.store_here.put_chunk(data) == digest


class Twins:
    """Both sides: ``here`` and ``there`` are the folders."""

    def __init__(self, folder: Path, portal: Any) -> None:
        self.folder = folder
        self.here = folder / "project"
        self.here.mkdir(exist_ok=True)
        self.machine = folder / "machine"
        self.machine.mkdir(exist_ok=True)
        self._portal = portal
        self.store_here = ChunkStore(folder / "store")
        self.store_there = ChunkStore(folder / "machine" / "store")
        self.restart_agent()
        self.restart()
        self.there = self.files.folder / self.workspace.name

    def restart_agent(self) -> None:
        self.files = Files(self.machine, self.store_there)
        self.peer = Direct(self.files, self.store_there, self.store_here, self._portal)

    def restart(self, machine: str = "m1") -> None:
        """Another process on the notebook's side."""
        self.workspace = Workspace(
            self.here,
            self.peer,
            self.store_here,
            machine=machine,
            machine_name="box",
            state=self.folder / "state",
        )

    def sync(self, **options: Any) -> Report:
        """After a cell: the machine is asked what has changed there."""
        self.workspace.stale = True
        return self.workspace.sync(**options)

    def write(self, path: str, content: str = "", *, there: bool = False) -> Path:
        file = (self.there if there else self.here) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        return file


def contents(folder: Path) -> dict[str, object]:
    """All that lies in a folder, by path."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = ("link", str(path.readlink()))
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = path.read_bytes()
    return found


@contextmanager
def twins(folder: Path) -> Iterator[Twins]:
    with anyio.from_thread.start_blocking_portal() as portal:
        yield Twins(folder, portal)
