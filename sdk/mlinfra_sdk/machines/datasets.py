"""Have the datasets of ``data=`` on a machine before a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from mlinfra_sdk import paths, sources
from mlinfra_sdk.datasets.cache import key_of, version_of
from mlinfra_sdk.datasets.credentials import options_for
from mlinfra_sdk.datasets.local import File, Folder
from mlinfra_sdk.errors import ChunkMissing
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.machines.moves import Progress
from mlinfra_sdk.sources import Source
from mlinfra_sdk.worker import messages as m

_BATCH_BYTES = 256 << 20
_BATCH_FILES = 2000


class Placed:
    """The datasets that one machine is known to have. What is at a URL is looked at once for each
    machine; local folders are looked at each time."""

    def __init__(self) -> None:
        self._versions: dict[Source, str] = {}

    def place(
        self,
        client: AgentClient,
        wanted: tuple[Source, ...],
        progress: Progress,
        root: Path,
        *,
        workspace: str = "",
        credentials: bool = False,
        in_place: bool = False,
    ) -> None:
        """Bring what is missing. An interrupt stops that; another time it goes on.

        Paths are relative to ``root``, whose twin on the machine is called ``workspace``.
        ``in_place``: the machine uses the folders of this one.
        """
        for source in wanted:
            if source.is_url:
                if source not in self._versions:
                    _fetch(client, source, progress, credentials)
                    self._versions[source] = "fetched"
            elif in_place:
                path = sources.local_folder(source, root)
                Folder(path, path).check()
                client.send(m.LinkDataset(client.next_id(), source.name, str(path))).result()
            else:
                known = self._versions.get(source, "")
                version = _send(client, source, progress, root, workspace, known)
                self._versions[source] = version


def _fetch(client: AgentClient, source: Source, progress: Progress, credentials: bool) -> None:
    options = options_for(source.location, credentials)
    request = m.FetchDataset(client.next_id(), source.name, source.location, options)
    try:
        state = client.ask(request, m.DatasetState)
        while not state.ready:
            state = client.ask(m.WatchDataset(client.next_id(), source.name), m.DatasetState)
            if state.total:
                progress(state.done, state.total)
    except KeyboardInterrupt:
        client.send(m.DropDataset(client.next_id(), source.name))
        raise


def _send(
    client: AgentClient,
    source: Source,
    progress: Progress,
    root: Path,
    workspace: str,
    known: str,
) -> str:
    """Bring a local folder there; gives its version."""
    path = sources.local_folder(source, root)
    key = key_of(str(path))
    folder = Folder(path, paths.data_dir() / "datasets" / f"{key}.index")
    files = folder.scan()
    entries = [file.entry() for file in files]
    version = version_of(entries)
    if version == known:
        return version
    link = next(iter(sources.inside((source,), root)), "")
    name = path.name if path.is_file() else ""
    use = m.UseDataset(client.next_id(), source.name, key, version, name, link, workspace)
    if not client.ask(use, bool):
        total, done = sum(file.size for file in files), 0
        for batch in _batches(files):

            def tell(moved: int, of: int, before: int = done) -> None:
                progress(min(before + moved, total), total)

            try:
                _bring(client, key, version, batch, tell, folder)
            except ChunkMissing:  # another client's equal file took what was to be in both
                _bring(client, key, version, batch, tell, folder)
            done += sum(file.size for file in batch)
            progress(done, total)
        client.send(m.FinishDataset(client.next_id(), key, version, entries)).result()
        client.ask(msgspec.structs.replace(use, id=client.next_id()), bool)
    return version


def _bring(
    client: AgentClient, key: str, version: str, batch: list[File], tell: Progress, folder: Folder
) -> None:
    offer = m.OfferFiles(client.next_id(), key, version, batch)
    client.upload(client.ask(offer, list[bytes]), tell, source=folder)
    client.send(m.WriteFiles(client.next_id(), key, version, batch)).result()


def _batches(files: list[File]) -> Iterator[list[File]]:
    batch: list[File] = []
    size = 0
    for file in files:
        batch.append(file)
        size += file.size
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_FILES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
