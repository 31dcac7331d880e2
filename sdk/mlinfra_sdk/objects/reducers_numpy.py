"""numpy arrays: views of one memory stay views of one memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mlinfra_sdk.objects.extents import Extent

if TYPE_CHECKING:
    from mlinfra_sdk.objects.codec import Encoder

Array = np.ndarray[Any, np.dtype[Any]]


def reduce_array(encoder: Encoder, array: Array) -> Any:
    """An array by its bytes, or as a view of a stretch that other arrays of the graph share."""
    if array.dtype.hasobject or not array.size:
        return array.__reduce_ex__(5)
    owner = owner_of(array)
    base = owner.__array_interface__["data"][0]
    low, high = byte_bounds(array)
    key = id(owner)
    extent = encoder.memories.claim(key, low - base, high - low, base, owner, as_bytes)
    flags = array.flags
    layout = array.shape, array.dtype, flags.writeable
    if array is owner and flags.forc and flags.writeable:
        encoder.memories.owns(key, 0, array.nbytes)
        if key in encoder.memories.owned or key not in encoder.memories.shared:
            whole = Extent(base, 0, array.nbytes, array, (make_owner, array.strides, *layout[:2]))
            return whole.__reduce_ex__(5)
    elif key in encoder.memories.owned and key in encoder.memories.shared:
        return make_view_of, (owner, low_offset(array, base), array.strides, *layout)
    if key in encoder.memories.shared:
        return make_view, (extent, low_offset(array, base) - extent.start, array.strides, *layout)
    if high - low == array.nbytes:  # dense, whatever the order of its axes
        return make_view, (extent, low_offset(array, low), array.strides, *layout)
    copy = np.ascontiguousarray(array)
    encoder.keep_alive.append(copy)
    address = copy.__array_interface__["data"][0]
    dense = encoder.memories.claim(id(copy), 0, copy.nbytes, address, copy, as_bytes)
    return make_view, (dense, 0, copy.strides, *layout)


def low_offset(array: Array, base: int) -> int:
    """Distance of the first item from ``base`` (which lies behind others if a stride is < 0)."""
    return int(array.__array_interface__["data"][0]) - base


def as_bytes(buffer: Any) -> Array:
    """The memory of the views of a graph."""
    return np.frombuffer(buffer, np.uint8)


def make_owner(
    buffer: Any, strides: tuple[int, ...], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Array:
    """An array that is no view of another one, so that views of it have it as their base."""
    array: Array = np.ndarray(shape, dtype, buffer, 0, strides)
    # A small one that came within the stream can own its memory, too.
    return array if isinstance(buffer, memoryview) else array.copy("K")


def make_view_of(
    owner: Array,
    offset: int,
    strides: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    writeable: bool,
) -> Array:
    """A view of an array of the same graph."""
    memory = owner.reshape(-1, order="A").view(np.uint8)
    return make_view(memory, offset, strides, shape, dtype, writeable)


def make_view(
    memory: Array,
    offset: int,
    strides: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    writeable: bool,
) -> Array:
    """An array in the memory."""
    array: Array = np.ndarray(shape, dtype, memory, offset, strides)
    array.flags.writeable = writeable
    return array


def owner_of(array: Array) -> Array:
    """The array whose memory this one is a view of."""
    owner: Any = array
    current: Any = array
    while (current := getattr(current, "base", None)) is not None:
        if isinstance(current, np.ndarray):
            owner = current
    return owner  # type: ignore[no-any-return]


def byte_bounds(array: Array) -> tuple[int, int]:
    """The addresses between which the items lie."""
    low = high = int(array.__array_interface__["data"][0])
    for length, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            low += (length - 1) * stride
        else:
            high += (length - 1) * stride
    return low, high + array.itemsize
