"""A checkpoint as plain files, for programs that know nothing of this one."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import msgspec

from mlinfra_sdk.checkpoints.manifest import File, Manifest
from mlinfra_sdk.checkpoints.snapshot import load
from mlinfra_sdk.checkpoints.store import CheckpointStore
from mlinfra_sdk.errors import CheckpointError, RequestError
from mlinfra_sdk.objects.store import ChunkStore


def export(manifest: Manifest, store: CheckpointStore, folder: Path) -> list[Path]:
    """Write each entry of the state into a file of its own: torch's as ``.pt``, arrays as
    ``.npy``, boosters in their library's format, the rest as ``.pkl``; and what is known of the
    checkpoint as ``checkpoint.json``. Files of a watched folder get their own names.

    Raises :class:`RequestError` if the folder is not empty, :class:`CheckpointError` for damage.
    """
    if folder.exists() and any(folder.iterdir()):
        raise RequestError(f"{folder} is not empty.", hint="Name a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "name": manifest.name,
        "number": manifest.number,
        "step": manifest.step,
        "created": manifest.created,
        "finished": manifest.finished,
        "metrics": manifest.metrics,
    }
    written = [folder / "checkpoint.json"]
    written[0].write_bytes(msgspec.json.format(msgspec.json.encode(facts), indent=2) + b"\n")
    for name, part in manifest.parts.items():
        safe = "".join(it if it.isalnum() or it in "._-" else "_" for it in name)
        written.append(_write(folder / safe, part.kind, load(part, store.chunks)))
    for file in manifest.files:
        written.append(write_file(file, store.chunks, folder))
    return written


def write_file(file: File, chunks: ChunkStore, folder: Path) -> Path:
    """Put one file of a watched folder in place, whole or not at all. Raises
    :class:`CheckpointError` if it would lie outside: what a machine sends is not believed."""
    path = folder / file.path
    if os.path.isabs(file.path) or not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{file.path!r} leads out of the folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    with open(temporary, "wb") as target:
        if file.content.inline is not None:
            target.write(file.content.inline)
        for digest in file.content.chunks:
            target.write(chunks.read_chunk(digest))
    os.utime(temporary, ns=(file.mtime, file.mtime))
    temporary.replace(path)
    return path


def _write(path: Path, kind: str, value: Any) -> Path:
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if kind == "module":
        value = value["state"]
    if torch is not None and (kind in ("module", "stateful") or isinstance(value, torch.Tensor)):
        path = path.with_name(f"{path.name}.pt")
        torch.save(value, path)
    elif numpy is not None and isinstance(value, numpy.ndarray) and not value.dtype.hasobject:
        path = path.with_name(f"{path.name}.npy")
        numpy.save(path, value)
    elif kind == "lightgbm":
        path = path.with_name(f"{path.name}.txt")
        path.write_text(value)
    elif kind == "xgboost":
        import xgboost

        booster = xgboost.Booster.__new__(xgboost.Booster)
        booster.__setstate__({"handle": bytearray(value)})
        path = path.with_name(f"{path.name}.ubj")
        path.write_bytes(booster.save_raw("ubj"))
    else:
        path = path.with_name(f"{path.name}.pkl")
        path.write_bytes(pickle.dumps(value))
    return path
