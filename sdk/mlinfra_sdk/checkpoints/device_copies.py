"""Copies of GPU tensors on the GPU itself: that takes milliseconds, and they come to the host while
training goes on. They need memory there, so they are made only where enough of it is free."""

from __future__ import annotations

from typing import Any

import torch

KINDS = ("cuda",)
"""Types of devices; torch calls those of AMD ``cuda``, too."""
_SPARE = 0.05
"""Share of the device's memory that copies leave free: training must not run out of it."""


class DeviceCopy:
    """A copy of a tensor's memory on its device."""

    def __init__(self, flat: torch.Tensor) -> None:
        self._module: Any = getattr(torch, flat.device.type)
        self._copy: torch.Tensor | None = flat.clone()
        self._made = self._module.Event()
        self._made.record(self._module.current_stream(flat.device))
        self.nbytes = flat.numel() * flat.element_size()

    def bring(self, target: memoryview) -> None:
        """Copy it to the host, in any thread, and free the memory on the device. On a stream of its
        own: training's work on the device goes on meanwhile."""
        copy, self._copy = self._copy, None
        assert copy is not None, "it has been brought before"
        stream = self._module.Stream(copy.device)
        with self._module.stream(stream):
            self._made.wait(stream)
            torch.frombuffer(target, dtype=torch.uint8).copy_(copy.view(torch.uint8))


class DeviceCopies:
    """Those of one save."""

    def __init__(self) -> None:
        self._room: dict[torch.device, int] = {}
        self._made: dict[tuple[torch.device, int, int], DeviceCopy] = {}

    def take(self, flat: torch.Tensor) -> DeviceCopy | None:
        """A copy of a one-dimensional tensor without gaps; the same one for the same memory. None
        where there is no room for it, or no need."""
        device = flat.device
        if device.type not in KINDS:
            return None
        size = flat.numel() * flat.element_size()
        key = device, flat.data_ptr(), size
        if key in self._made:
            return self._made[key]
        if device not in self._room:
            self._room[device] = room(device)
        if size > self._room[device]:
            return None
        try:
            copy = DeviceCopy(flat)
        except torch.cuda.OutOfMemoryError:  # what is free is in pieces
            return None
        self._room[device] -= size
        self._made[key] = copy
        return copy


def room(device: torch.device) -> int:
    """Bytes of a device that copies may take."""
    free, total = torch.cuda.mem_get_info(device)
    return int(free - _SPARE * total)
