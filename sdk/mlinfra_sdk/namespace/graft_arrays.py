"""How objects of numpy, torch and pandas take over the content of their new versions.

The libraries are found by the names of their types: nothing is imported that is not loaded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlinfra_sdk.namespace.graft import Grafting


# numpy


def _ndarray(work: Grafting, new: Any) -> Any:
    import numpy as np

    old = work.old(new)
    if old is None or not _fits(old, new):
        target = _view_of_old(work, new)
        old = None
    else:
        target = old
    if new.dtype.hasobject and new.dtype == object:
        _walk_objects(work, new, target)
    elif old is not None:
        work.stores.append(lambda: np.copyto(old.view(np.ndarray), new.view(np.ndarray)))
    if type(new) is not np.ndarray:
        work.attributes(new, target)
    return target


def _fits(old: Any, new: Any) -> bool:
    return bool(old.shape == new.shape and old.dtype == new.dtype and old.flags.writeable)


def _view_of_old(work: Grafting, new: Any) -> Any:
    """The same view of the old memory where the new array looks into a paired one."""
    import numpy as np

    base = new.base
    if type(new) is not np.ndarray or type(base) is not np.ndarray:
        return new
    old_base = work.resolve(base)
    if old_base is base or old_base.strides != base.strides or not old_base.flags.forc:
        return new
    offset = new.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    # Directly on the old array, so that it is the view's base, where numpy can do that.
    memory = old_base if old_base.flags.c_contiguous else old_base.ravel(order="K")
    view: Any = np.ndarray(new.shape, new.dtype, memory, offset, new.strides)
    view.flags.writeable = new.flags.writeable
    return view


def _walk_objects(work: Grafting, new: Any, target: Any) -> None:
    import numpy as np

    def walk() -> None:
        values = list(new.flat)
        resolved = values if work.atomic(values) else work.resolve_all(values)
        if target is new and all(map(operator.is_, values, resolved)):
            return
        content = _object_array(resolved)
        work.stores.append(lambda: np.copyto(target, content.reshape(new.shape)))

    work.walks.append(walk)


def _object_array(values: list[Any]) -> Any:
    import numpy as np

    # Element by element: numpy would look into sequences.
    content = np.empty(len(values), dtype=object)
    for index, value in enumerate(values):
        content[index] = value
    return content


def _bit_generator(work: Grafting, new: Any) -> Any:
    old = work.old(new)
    if old is None:
        return new
    work.stores.append(lambda: setattr(old, "state", new.state))
    return old


def _generator(work: Grafting, new: Any) -> Any:
    old = work.old(new)
    if old is None or type(old.bit_generator) is not type(new.bit_generator):
        return new
    work.stores.append(lambda: setattr(old.bit_generator, "state", new.bit_generator.state))
    return old


def _random_state(work: Grafting, new: Any) -> Any:
    old = work.old(new)
    if old is None or type(old._bit_generator) is not type(new._bit_generator):
        return new
    work.stores.append(lambda: old.set_state(new.get_state(legacy=False)))
    return old


# torch


class Tensors:
    """Keeps tensors that share a storage sharing one: the old storage where there is one.

    Of a storage only the stretch travels that the tensors of a cell look into, so the new storage
    may be a part of the old one, which begins so many bytes into it."""

    def __init__(self) -> None:
        self._targets: dict[int, tuple[Any, int]] = {}
        """Address of a new storage -> the storage that takes its place, and where it begins there,
        in bytes."""
        self._claimed: dict[int, list[range]] = {}
        self._unpaired: list[Any] = []

    def plan(self, old: Any, new: Any) -> Callable[[], object]:
        """How the old tensor gets the data of the new one."""
        new_storage, old_storage = new.untyped_storage(), old.untyped_storage()
        key = new_storage.data_ptr()
        if not key:
            return lambda: _set_data(old, new.data)
        start = (old.storage_offset() - new.storage_offset()) * new.element_size()
        stretch = range(start, start + new_storage.nbytes())
        alike = (old.dtype, old.device, old.size(), old.stride()) == (
            new.dtype,
            new.device,
            new.size(),
            new.stride(),
        )
        fits = alike and stretch.start >= 0 and stretch.stop <= old_storage.nbytes()
        if key not in self._targets:
            taken = self._claimed.setdefault(old_storage.data_ptr(), [])
            if fits and not any(_overlap(stretch, other) for other in taken):
                taken.append(stretch)
                self._targets[key] = old_storage, start
                if stretch == range(old_storage.nbytes()):
                    return lambda: old_storage.copy_(new_storage)
            else:
                self._targets[key] = new_storage, 0
        target, begin = self._targets[key]
        if target.data_ptr() == key:
            return lambda: _set_data(old, new.data)
        if fits and target.data_ptr() == old_storage.data_ptr() and begin == start:
            whole = new_storage.nbytes() == old_storage.nbytes()
            return (lambda: None) if whole else lambda: _copy(old, new)
        return lambda: _set_data(old, self._moved(new, target, begin))

    def unpaired(self, new: Any) -> None:
        self._unpaired.append(new)

    def relink(self) -> None:
        """Let new tensors that share memory with a paired one share the old memory."""
        for new in self._unpaired:
            storage = new.untyped_storage()
            target, begin = self._targets.get(storage.data_ptr(), (storage, 0))
            if target.data_ptr() != storage.data_ptr():
                _set_data(new, self._moved(new, target, begin))

    @staticmethod
    def _moved(new: Any, target: Any, begin: int) -> Any:
        """A tensor in the storage that takes the place of its own, with its content."""
        offset, rest = divmod(begin, new.element_size())
        if rest:  # there it would not lie on a whole element
            return new.data
        empty = new.data.new_empty(0, device=target.device)
        view = empty.set_(target, offset + new.storage_offset(), new.size(), new.stride())
        _copy(view, new)
        return view


def _overlap(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)


def _copy(old: Any, new: Any) -> None:
    """The elements of a tensor, each memory once: what is expanded cannot be written to."""
    if new.numel():
        once = tuple(0 if step == 0 else slice(None) for step in new.stride())
        old.data[once].copy_(new.data[once])


def _set_data(old: Any, data: Any) -> None:
    old.data = data


def _tensor(work: Grafting, new: Any) -> Any:
    import torch

    old = work.old(new)
    plain = new.layout is torch.strided and new.device.type != "meta"
    if old is not None and not torch._has_compatible_shallow_copy_type(old, new):
        old = None
    target = new if old is None else old
    if old is not None:
        work.stores.append(
            work.tensors.plan(old, new) if plain else lambda: _set_data(old, new.data)
        )
        if old.is_leaf and old.requires_grad != new.requires_grad:
            work.stores.append(lambda: old.requires_grad_(new.requires_grad))
    elif plain:
        work.tensors.unpaired(new)
    # Only leaves keep gradients; asking others for theirs gives a warning.
    if new.is_leaf and target.is_leaf and (new.grad is not None or target.grad is not None):
        gradient = work.resolve(new.grad)
        work.stores.append(lambda: setattr(target, "grad", gradient))
    work.attributes(new, target)
    return target


def _torch_generator(work: Grafting, new: Any) -> Any:
    old = work.old(new)
    if old is None or old.device != new.device:
        return new
    work.stores.append(lambda: old.set_state(new.get_state()))
    return old


# pandas


def _frame(work: Grafting, new: Any) -> Any:
    old = work.old(new)
    target = new if old is None else old

    def walk() -> None:
        updated = _resolved_columns(work, new)

        def store() -> None:
            target.__setstate__(updated.__getstate__())
            # pandas 2 remembers the columns it has handed out.
            getattr(target, "_item_cache", {}).clear()

        if target is not updated:
            work.stores.append(store)

    work.walks.append(walk)
    return target


def _resolved_columns(work: Grafting, new: Any) -> Any:
    """The frame with the Python objects in it resolved; itself where nothing changes."""
    if new.ndim == 1:
        column = _resolved_column(work, new)
        return new if column is None else column
    updated = new
    for position in [index for index, dtype in enumerate(new.dtypes) if dtype.name == "object"]:
        column = _resolved_column(work, new.iloc[:, position])
        if column is not None:
            updated = new.copy(deep=False) if updated is new else updated
            updated.isetitem(position, column)
    return updated


def _resolved_column(work: Grafting, column: Any) -> Any:
    if column.dtype.name != "object":
        return None
    values = list(column.array)
    if work.atomic(values):
        return None
    resolved = work.resolve_all(values)
    if all(map(operator.is_, values, resolved)):
        return None
    content = _object_array(resolved)
    updated = column.copy(deep=False)
    updated.iloc[:] = content
    return updated


HANDLERS: dict[str, Callable[[Grafting, Any], Any] | None] = {
    "numpy.ndarray": _ndarray,
    "numpy.random._generator.Generator": _generator,
    "numpy.random.bit_generator.BitGenerator": _bit_generator,
    "numpy.random.mtrand.RandomState": _random_state,
    "torch.Tensor": _tensor,
    "torch._C.Generator": _torch_generator,
    "pandas.core.generic.NDFrame": _frame,
    # Updated when it is rebuilt.
    "ipywidgets.widgets.widget.Widget": None,
    # Immutable by design, whatever their classes are made of.
    "pandas.Index": None,
    "pandas.core.indexes.base.Index": None,
}
