"""torch tensors in checkpoints: their memory as one buffer, always on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pickle import PickleBuffer
from typing import Any

import torch

Reduced = tuple[Callable[..., torch.Tensor], tuple[Any, ...]]
Hold = Callable[[torch.Tensor], PickleBuffer | None]


def reduce_tensor(tensor: torch.Tensor, hold: Hold) -> Reduced | None:
    """How to pickle a dense tensor, else None. One on the CPU refers to its memory, which is copied
    by whoever collects buffers. One of another device is copied to the CPU here, unless ``hold``
    takes its elements, in the order of its memory, and gives a buffer that stands for them."""
    if (
        type(tensor) not in (torch.Tensor, torch.nn.Parameter)
        or tensor.layout != torch.strided
        or tensor.is_quantized
        or tensor.is_nested
        or tensor.device.type == "meta"
    ):
        return None
    dense = tensor.detach()
    if dense.device.type not in ("cpu", "cuda"):
        dense = dense.cpu()
    dense = dense.resolve_conj().resolve_neg()
    if not dense.is_contiguous() and not _is_dense(dense):
        dense = dense.contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))
    buffer = hold(flat)
    if buffer is None:
        data: Any = flat.cpu().view(torch.uint8).numpy() if dense.numel() else b""
        buffer = PickleBuffer(data)
    parameter = type(tensor) is torch.nn.Parameter
    arguments = (buffer, dense.dtype, tuple(dense.shape), dense.stride())
    return make_tensor, (*arguments, tensor.requires_grad, parameter)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether it fills its memory without gaps and overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def make_tensor(
    data: Any,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    parameter: bool,
) -> torch.Tensor:
    """The tensor again."""
    memory = memoryview(data)
    if not memory.nbytes:
        tensor = torch.empty(shape, dtype=dtype)
    else:
        writable = bytearray(memory) if memory.readonly else memory
        tensor = torch.frombuffer(writable, dtype=dtype).as_strided(shape, strides)
    if parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_() if requires_grad else tensor
