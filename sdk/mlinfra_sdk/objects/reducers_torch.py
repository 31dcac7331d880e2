"""torch tensors: storages stay shared, devices are remembered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mlinfra_sdk.objects.realm import current_realm
from mlinfra_sdk.objects.reducers import reduce_default

if TYPE_CHECKING:
    from mlinfra_sdk.objects.codec import Encoder


def reduce_tensor(encoder: Encoder, tensor: torch.Tensor) -> Any:
    """A tensor as a view of a stretch of its storage, which other tensors may share."""
    if (
        type(tensor) not in (torch.Tensor, torch.nn.Parameter)
        or tensor.layout != torch.strided
        or tensor.is_quantized
        or tensor.is_nested
        or tensor.is_conj()
        or tensor.is_neg()
        or tensor.device.type == "meta"
    ):
        return tensor.__reduce_ex__(5)  # type: ignore[no-untyped-call]
    storage = tensor.untyped_storage()
    item = tensor.element_size()
    low = int(tensor.storage_offset()) * item
    size = 0
    if tensor.numel():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        size = (sum((n - 1) * stride for n, stride in steps) + 1) * item
    key = ("torch", storage._cdata)
    device = encoder.realm.home_devices.get(tensor) or str(tensor.device)
    base, owner = storage.data_ptr(), storage
    if tensor.device.type != "cpu":
        # The whole storage is copied: other tensors of the graph may need the rest of it.
        copies = encoder.host_copies
        if key not in copies:
            copies[key] = storage.cpu()  # type: ignore[no-untyped-call]
        owner = copies[key]
        base = owner.data_ptr()
    extent = encoder.memories.claim(key, low, size, base, owner, make_storage, device)
    encoder.keep_alive.append(storage)
    arguments = (
        extent,
        tensor.dtype,
        (low - extent.start) // item,
        tuple(tensor.shape),
        tensor.stride(),
        tensor.requires_grad,
        device,
        type(tensor) is torch.nn.Parameter,
    )
    state: dict[str, Any] = {}
    if tensor.is_leaf and tensor.grad is not None:
        state["grad"] = tensor.grad
    if tensor.__dict__:
        state["attributes"] = dict(tensor.__dict__)
    if not state:
        return make_tensor, arguments
    return make_tensor, arguments, state, None, None, set_tensor


def make_storage(buffer: Any, device: str) -> torch.UntypedStorage:
    """The storage on its device if that is here, else on the CPU."""
    if not memoryview(buffer).nbytes:
        storage = torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
    else:
        storage = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    return storage.to(device=torch.device(device)) if _available(device) else storage


def make_tensor(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    device: str,
    parameter: bool,
) -> torch.Tensor:
    """A view of the storage."""
    tensor = torch.empty(0, dtype=dtype, device=storage.device)
    tensor.set_(storage, offset, shape, strides)
    if parameter:
        tensor = torch.nn.Parameter(tensor, requires_grad)
    elif requires_grad:
        tensor.requires_grad_()
    if torch.device(device).type != storage.device.type:
        current_realm().home_devices[tensor] = device
    return tensor


def set_tensor(tensor: torch.Tensor, state: dict[str, Any]) -> None:
    """Gives a tensor its gradient and attributes."""
    tensor.__dict__.update(state.get("attributes", {}))
    if "grad" in state:
        tensor.grad = state["grad"]


def reduce_optimizer(encoder: Encoder, optimizer: torch.optim.Optimizer) -> Any:
    """An optimizer with what its own pickling leaves out: hooks, and the ``step`` that learning
    rate schedulers have wrapped."""
    reduced = reduce_default(encoder, optimizer)
    if type(optimizer).__getstate__ is torch.optim.Optimizer.__getstate__ and len(reduced) > 2:
        return *reduced[:2], dict(vars(optimizer)), *reduced[3:]
    return reduced


def _available(device: str) -> bool:
    kind = torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.is_available() and (kind.index or 0) < torch.cuda.device_count()
    if kind.type == "mps":
        return torch.backends.mps.is_available()
    return False
