"""A quick copy of a state: all that a training loop waits for.

Pickling keeps large buffers (arrays, tensors) outside of the stream; several threads then copy them
into memory that is kept from one copy to the next. Tensors on a GPU are copied there and brought
here later. What follows (hashing, writing) works on the copy.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any

import msgspec
from cloudpickle import cloudpickle

from mlinfra_sdk.checkpoints.manifest import Part
from mlinfra_sdk.errors import CheckpointError, ChunkCorrupt, ChunkMissing
from mlinfra_sdk.objects.blob import Packed
from mlinfra_sdk.objects.store import INLINE_LIMIT, ChunkStore

if TYPE_CHECKING:
    import torch

    from mlinfra_sdk.checkpoints.device_copies import DeviceCopies, DeviceCopy

_PIECE = 8 << 20
_THREADS = min(4, os.cpu_count() or 1)


class Arena:
    """Memory for copies. A state has the same buffers again and again, so each is asked for by its
    place in their order; fresh memory would cost several times the copy."""

    def __init__(self) -> None:
        self._slots: list[memoryview] = []
        self._used = 0

    def rewind(self) -> None:
        """Another copy begins; the one before is not needed any more."""
        self._used = 0

    def take(self, size: int) -> memoryview:
        """Memory of so many bytes."""
        index, self._used = self._used, self._used + 1
        if index == len(self._slots):
            self._slots.append(_memory(size))
        elif self._slots[index].nbytes != size:
            self._slots[index] = _memory(size)
        return self._slots[index]

    def trim(self) -> None:
        """Let go of what this copy did not use."""
        del self._slots[self._used :]


def _memory(size: int) -> memoryview:
    if "numpy" in sys.modules:
        return memoryview(sys.modules["numpy"].empty(size, "u1"))  # not cleared first
    return memoryview(bytearray(size))


class Captured(msgspec.Struct, eq=False):
    """One pickled entry of a state; ``buffers`` lie in an arena. Those in ``coming`` have yet to be
    filled."""

    kind: str
    stream: bytes
    buffers: list[memoryview]
    coming: list[tuple[DeviceCopy, memoryview]] = []

    def bring(self) -> None:
        """Fill them."""
        while self.coming:
            copy, target = self.coming.pop()
            copy.bring(target)

    def store(self, chunks: ChunkStore) -> Part:
        """Hash and write it."""
        refs = [chunks.put_buffer(buffer) for buffer in self.buffers]
        return Part(self.kind, Packed(chunks.put_buffer(self.stream), refs))


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO, copies: DeviceCopies | None) -> None:
        self.buffers: list[memoryview | DeviceCopy] = []
        self._copies = copies
        self._held: dict[int, tuple[PickleBuffer, DeviceCopy]] = {}
        super().__init__(file, protocol=5, buffer_callback=self._in_band)

    def _in_band(self, buffer: PickleBuffer) -> bool:
        if id(buffer) in self._held:
            self.buffers.append(self._held[id(buffer)][1])
            return False
        raw = buffer.raw()
        if raw.nbytes < INLINE_LIMIT:
            return True
        self.buffers.append(raw)
        return False

    def _hold(self, flat: torch.Tensor) -> PickleBuffer | None:
        if self._copies is None or flat.numel() * flat.element_size() < INLINE_LIMIT:
            return None
        copy = self._copies.take(flat)
        if copy is None:
            return None
        stand_in = PickleBuffer(b"")
        self._held[id(stand_in)] = stand_in, copy
        return stand_in

    def reducer_override(self, obj: object) -> Any:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(obj, torch.Tensor):
            from mlinfra_sdk.checkpoints.tensors import reduce_tensor

            reduced = reduce_tensor(obj, self._hold)
            if reduced is not None:
                return reduced
        return super().reducer_override(obj)


def capture(values: Mapping[str, tuple[str, Any]], arena: Arena) -> dict[str, Captured]:
    """Copies entries, each with its kind. Raises :class:`CheckpointError` for what cannot be
    pickled."""
    arena.rewind()
    captured: dict[str, Captured] = {}
    device_copies = _device_copies()
    copies: dict[tuple[int, int], memoryview] = {}
    todo: list[tuple[memoryview, memoryview]] = []
    for name, (kind, value) in values.items():
        file = io.BytesIO()
        pickler = _Pickler(file, device_copies)
        try:
            pickler.dump(value)
        except Exception as error:
            raise CheckpointError(
                f"{name!r} of the checkpoint's state cannot be saved "
                f"({type(error).__name__}: {error}).",
                hint="Leave it out, and make it anew before the loop.",
            ) from error
        buffers, coming = [], []
        for raw in pickler.buffers:
            key = _address(raw), raw.nbytes  # tied weights are one memory
            if key not in copies or not key[0]:
                copies[key] = arena.take(raw.nbytes)
                if isinstance(raw, memoryview):
                    todo.append((copies[key], raw))
                else:
                    coming.append((raw, copies[key]))
            buffers.append(copies[key])
        captured[name] = Captured(kind, file.getvalue(), buffers, coming)
    _copy(todo)
    arena.trim()
    return captured


def _device_copies() -> DeviceCopies | None:
    if "torch" not in sys.modules:
        return None
    from mlinfra_sdk.checkpoints.device_copies import DeviceCopies

    return DeviceCopies()


def _address(raw: memoryview | DeviceCopy) -> int:
    if not isinstance(raw, memoryview):
        return -id(raw)
    numpy = sys.modules.get("numpy")
    return int(numpy.frombuffer(raw, "u1").ctypes.data) if numpy is not None else 0


def _copy(todo: list[tuple[memoryview, memoryview]]) -> None:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        for target, source in todo:
            target[:] = source
        return
    pieces = [
        (target[start : start + _PIECE], source[start : start + _PIECE])
        for target, source in todo
        for start in range(0, source.nbytes, _PIECE)
    ]

    def copy(pair: tuple[memoryview, memoryview]) -> None:  # numpy lets other threads run
        numpy.copyto(numpy.frombuffer(pair[0], "u1"), numpy.frombuffer(pair[1], "u1"))

    if len(pieces) < 2:
        for pair in pieces:
            copy(pair)
        return
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(copy, pieces))


def load(part: Part, chunks: ChunkStore) -> Any:
    """The value of an entry. Raises :class:`CheckpointError` if it is damaged."""
    try:
        stream = chunks.read(part.packed.stream)
        buffers = [chunks.map(ref) for ref in part.packed.buffers]
    except (ChunkCorrupt, ChunkMissing) as error:
        raise CheckpointError(error.message) from error
    try:
        return pickle.loads(stream, buffers=buffers)
    except Exception as error:
        raise CheckpointError(
            f"A part of the checkpoint cannot be loaded ({type(error).__name__}: {error}).",
            hint="Import or define what it is made of first.",
        ) from error
