"""One run by itself, for services that run programs but let nobody talk to them.

``python -m mlinfra_sdk.worker.batch FOLDER`` runs the :class:`Job` that lies there as ``job`` in a
kernel of its own, with chunks from ``store``, and leaves ``result.tar``: the run's journal, its
last record the result or how the kernel died, and the chunks that the result names.

What the journal begins with is also printed, a record a line, for services that show what a program
prints while it runs: :class:`Log` reads it.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec

from mlinfra_sdk.catalog import Gpus
from mlinfra_sdk.errors import MlinfraError
from mlinfra_sdk.namespace.delta import Outputs
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.sources import VARIABLE
from mlinfra_sdk.worker import gpus
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.journal import Gap, Journal
from mlinfra_sdk.worker.kernel_host import KernelHost
from mlinfra_sdk.worker.records import BEGUN, DIED, RESULT, Record, decode_record

JOB, STORE, ARCHIVE = "job", "store", "result.tar"
_JOURNAL = "journal/"
_CHUNKS = "chunks/"
_MARK = '{"mlinfra": '
"""How a record's line begins. Within JSON texts the quotes are escaped."""
_LONGEST = 128 << 10
"""Characters of a line, above which a record is not printed."""


class Job(msgspec.Struct, frozen=True):
    """What is to be run. ``gpu`` is what the machine must have, ``where`` what ``on=`` calls it."""

    request: m.Execute
    gpu: Gpus | None
    where: str


async def run(folder: Path) -> None:
    """Run the job of a folder and pack its result."""
    job = msgspec.msgpack.decode((folder / JOB).read_bytes(), type=Job)
    store = ChunkStore(folder / STORE)
    journal = Journal(folder / "journal")
    ended = anyio.Event()
    chunks: list[bytes] = []
    printing = True

    async def publish(record: Record) -> None:
        nonlocal printing
        if record.parent != job.request.run or record.msg_type == BEGUN:
            return
        number = journal.append(m.encode(record))
        # After one that is not printed none are: what is shown early keeps its order.
        line = _line(number, record) if printing else ""
        printing = bool(line)
        if not line and record.msg_type == "stream":  # for who looks at the service's own page
            line = json.loads(record.content)["text"]
        sys.stdout.write(line)
        sys.stdout.flush()
        if record.msg_type == RESULT:
            chunks.extend(msgspec.msgpack.decode(record.buffers[0], type=Outputs).digests())
        if record.msg_type in (RESULT, DIED):
            ended.set()

    env = {
        VARIABLE: str(folder / "data"),
        m.STORE_VARIABLE: str(folder / STORE),
        m.SHARED_VARIABLE: "0",
        m.WORKSPACES_VARIABLE: "",
    }
    async with anyio.create_task_group() as tasks:
        kernel = KernelHost("main", Path(tempfile.mkdtemp(prefix="m-")), env, tasks, publish)
        kernel.cwd = os.getcwd()
        try:
            if job.gpu is not None:
                gpus.require(job.gpu, job.where)
            await kernel.ensure()
            await kernel.execute(job.request)
            await ended.wait()
        except MlinfraError as error:
            content = json.dumps({"reason": str(error)}).encode()
            await publish(Record("main", job.request.run, 0, DIED, content))
        await kernel.close()
        tasks.cancel_scope.cancel()
    with tarfile.open(folder / ARCHIVE, "w") as archive:
        for path in sorted(journal.folder.iterdir()):
            archive.add(path, _JOURNAL + path.name)
        for digest in dict.fromkeys(chunks):
            data = store.read_chunk(digest)
            member = tarfile.TarInfo(_CHUNKS + digest.hex())
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _line(number: int, record: Record) -> str:
    """A record as it is printed; nothing for one that cannot be."""
    if record.buffers or record.msg_type in (RESULT, DIED):
        return ""
    said = {
        "mlinfra": number,
        "type": record.msg_type,
        "content": json.loads(record.content),
        "metadata": json.loads(record.metadata),
    }
    line = json.dumps({**said, "crc": _crc(said)})  # ASCII, without a line's end
    return f"{line}\n" if len(line) <= _LONGEST else ""


def _crc(said: dict[str, Any]) -> int:
    """Others may write into the middle of a long line."""
    return zlib.crc32(json.dumps(said).encode())


class Log:
    """Reads what a run prints: the records that its journal begins with, each once. The text may
    come in any pieces, with other texts in between, and from its beginning again."""

    def __init__(self) -> None:
        self.number = 0
        """Of the last record that was read."""
        self._rest = ""

    def rewind(self) -> None:
        """The text begins anew."""
        self._rest = ""

    def read(self, text: str) -> Iterator[Record]:
        """The records that the next piece completes, without run and kernel."""
        self._rest += "".join(text.splitlines())
        while (start := self._rest.find(_MARK)) >= 0:
            self._rest = self._rest[start:]
            try:
                said, end = json.JSONDecoder().raw_decode(self._rest)
            except json.JSONDecodeError:
                # It is not complete yet, or something else was written into it.
                end = self._rest.find(_MARK, 1)
                if end < 0 and len(self._rest) <= 2 * _LONGEST:
                    return
                self._rest = self._rest[end if end > 0 else 1 :]
                continue
            self._rest = self._rest[end:]
            if said.pop("crc", None) == _crc(said) and said["mlinfra"] == self.number + 1:
                self.number += 1
                content, metadata = (
                    json.dumps(said[it]).encode() for it in ("content", "metadata")
                )
                yield Record("", "", 0, said["type"], content, metadata)
        self._rest = self._rest[-len(_MARK) :]


def unpack(
    archive: Path, folder: Path, store: ChunkStore, after: int = 0
) -> Iterator[Record | Gap]:
    """The records of a result that come after number ``after``; its chunks are put into ``store``
    before. Raises :class:`tarfile.TarError` and OSError for what is no result."""
    journal = folder / "journal"
    journal.mkdir(mode=0o700)
    with tarfile.open(archive) as packed:
        for member in packed:
            file = packed.extractfile(member) if member.isfile() else None
            if file is None:
                continue
            if member.name.startswith(_CHUNKS):
                store.put_chunk(file.read())
            elif member.name.startswith(_JOURNAL):
                (journal / Path(member.name).name).write_bytes(file.read())
    reader = Journal.recover(journal).reader(after)
    while found := reader.read():
        for item in found:
            yield item if isinstance(item, Gap) else decode_record(item)


if __name__ == "__main__":
    anyio.run(run, Path(sys.argv[1]))
