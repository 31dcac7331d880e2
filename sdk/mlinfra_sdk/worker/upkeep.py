"""Upkeep of the machine: room on the disk, but nothing that is still needed goes."""

from __future__ import annotations

import logging
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from mlinfra_sdk.errors import StateError, StoreError
from mlinfra_sdk.namespace.delta import Inputs, Outputs
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.worker.host import Host

logger = logging.getLogger(__name__)

_EVERY_S = 600.0
_SHARE = 0.5
"""Share of its disk that the store may fill."""
_LEAST_FREE = 0.1
_decode_inputs = msgspec.msgpack.Decoder(Inputs).decode
_decode_outputs = msgspec.msgpack.Decoder(Outputs).decode


def pin_inputs(store: ChunkStore, run: str, folder: Path, inputs: bytes) -> None:
    """A run may wait in its queue for long: what it needs stays until it has ended."""
    if inputs:
        _pin(store, run, folder, _decode_inputs(inputs).digests())


def pin_outputs(store: ChunkStore, run: str, folder: Path, outputs: bytes) -> None:
    """A run may be collected days later: what it has left stays until its ``folder`` is gone."""
    _pin(store, run, folder, _decode_outputs(outputs).digests())


def _pin(store: ChunkStore, run: str, folder: Path, digests: list[bytes]) -> None:
    try:
        if digests:
            store.pin(run, digests, folder)
        else:
            store.unpin(run)
    except (StoreError, OSError):  # a full disk must not end the run
        logger.exception("The chunks of run %s could not be pinned", run)


async def keep_room(store: ChunkStore, host: Host) -> None:
    """Remove what was not used for long, now and then: chunks, and the SDK's environments."""
    while True:
        try:
            freed = await anyio.to_thread.run_sync(_collect, store, abandon_on_cancel=True)
            if freed:
                logger.info("%d bytes of chunks were removed", freed)
            removed = await anyio.to_thread.run_sync(host.tidy, abandon_on_cancel=True)
            if removed:
                logger.info("%d environments of the SDK were removed", removed)
        except (OSError, StateError):
            logger.exception("The machine could not be tidied")
        await anyio.sleep(_EVERY_S)


def _collect(store: ChunkStore) -> int:
    return store.collect_garbage(int(_SHARE * store.disk_size()), _LEAST_FREE)
