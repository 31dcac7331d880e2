"""Views that were made of arrays elsewhere become views of the same arrays here."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any


def pair_views(objects: Collection[object], pairs: dict[int, object]) -> None:
    """Completes ``pairs`` (id of a new object -> old object).

    A new array that shares memory with a paired one is paired with the corresponding view of the
    old array's memory. The same for tensors.
    """
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        arrays = [obj for obj in objects if type(obj) is numpy.ndarray]
        if len(arrays) > 1:
            _pair_arrays(arrays, pairs)
    torch = sys.modules.get("torch")
    if torch is not None:
        tensors = [obj for obj in objects if type(obj) in (torch.Tensor, torch.nn.Parameter)]
        if len(tensors) > 1:
            _pair_tensors(tensors, pairs)


def _pair_arrays(arrays: list[Any], pairs: dict[int, object]) -> None:
    import numpy as np

    from mlinfra_sdk.objects.reducers_numpy import byte_bounds, owner_of

    moved: dict[int, tuple[Any, int]] = {}  # id of new memory -> old memory, distance to it
    for new in arrays:
        old = pairs.get(id(new))
        if type(old) is np.ndarray and (old.dtype, old.shape, old.strides) == (
            new.dtype,
            new.shape,
            new.strides,
        ):
            owner = owner_of(old)
            if owner.flags.c_contiguous or owner.flags.f_contiguous:
                moved[id(owner_of(new))] = owner, _address(old) - _address(new)
    for new in arrays:
        owner, distance = moved.get(id(owner_of(new)), (None, 0))
        if owner is None or id(new) in pairs or owner.dtype.hasobject:
            continue
        low, high = byte_bounds(new)
        start = _address(owner)
        if start <= low + distance and high + distance <= start + owner.nbytes:
            flat = owner.reshape(-1, order="A").view(np.uint8)
            offset = _address(new) + distance - start
            view = np.ndarray(new.shape, new.dtype, flat, offset, new.strides)
            view.flags.writeable = new.flags.writeable and owner.flags.writeable
            pairs[id(new)] = view


def _address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def _pair_tensors(tensors: list[Any], pairs: dict[int, object]) -> None:
    import torch

    moved: dict[int, tuple[Any, int]] = {}  # id of new storage -> old storage, distance in bytes
    for new in tensors:
        old = pairs.get(id(new))
        if isinstance(old, torch.Tensor) and (old.dtype, old.shape, old.stride()) == (
            new.dtype,
            new.shape,
            new.stride(),
        ):
            distance = (old.storage_offset() - new.storage_offset()) * new.element_size()
            moved[new.untyped_storage()._cdata] = old.untyped_storage(), distance
    for new in tensors:
        storage, distance = moved.get(new.untyped_storage()._cdata, (None, 0))
        if storage is None or id(new) in pairs or new.requires_grad:
            continue
        offset, rest = divmod(distance, new.element_size())
        offset += new.storage_offset()
        span = sum((n - 1) * step for n, step in zip(new.shape, new.stride(), strict=True)) + 1
        if not rest and offset >= 0 and (offset + span) * new.element_size() <= storage.nbytes():
            view = torch.empty(0, dtype=new.dtype, device=storage.device)
            pairs[id(new)] = view.set_(storage, offset, new.shape, new.stride())
