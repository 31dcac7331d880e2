"""One run by itself, for services that run programs but let nobody talk to them.

``python -m mlinfra_sdk.worker.batch FOLDER`` runs the :class:`Job` that lies there as ``job`` in a
kernel of its own, with chunks from ``store``, and leaves ``result.tar``: the run's journal, its
last record the result or how the kernel died, and the chunks that the result names.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

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

JOB, STORE, RESULT = "job", "store", "result.tar"
_JOURNAL = "journal/"
_CHUNKS = "chunks/"


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

    async def publish(record: m.Record) -> None:
        if record.parent != job.request.run or record.msg_type == m.BEGUN:
            return
        journal.append(m.encode(record))
        if record.msg_type == "stream":  # for who looks at the service's own page
            sys.stdout.write(json.loads(record.content)["text"])
            sys.stdout.flush()
        if record.msg_type == m.RESULT:
            chunks.extend(msgspec.msgpack.decode(record.buffers[0], type=Outputs).digests())
        if record.msg_type in (m.RESULT, m.DIED):
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
            await publish(m.Record("main", job.request.run, 0, m.DIED, content))
        await kernel.close()
        tasks.cancel_scope.cancel()
    with tarfile.open(folder / RESULT, "w") as archive:
        for path in sorted(journal.folder.iterdir()):
            archive.add(path, _JOURNAL + path.name)
        for digest in dict.fromkeys(chunks):
            data = store.read_chunk(digest)
            member = tarfile.TarInfo(_CHUNKS + digest.hex())
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def unpack(archive: Path, folder: Path, store: ChunkStore) -> Iterator[m.Record | Gap]:
    """The records of a result, whose chunks are put into ``store`` before. Raises
    :class:`tarfile.TarError` and OSError for what is no result."""
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
    reader = Journal.recover(journal).reader()
    while found := reader.read():
        for item in found:
            yield item if isinstance(item, Gap) else m.decode_record(item)


if __name__ == "__main__":
    anyio.run(run, Path(sys.argv[1]))
