"""Whether two targets have come to the same results, and where not."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

RTOL, ATOL = 1e-3, 1e-5
"""Relative and absolute difference of numbers that still counts as agreement: other devices add in
another order, and train with fewer digits (TF32)."""
_MOST = 20


def differences(
    here: Any, there: Any, name: str = "", *, rtol: float = RTOL, atol: float = ATOL
) -> list[str]:
    """Where ``there`` is not as ``here``, in words; at most 20 places. What cannot be compared
    (models, functions) is passed over."""
    found: list[str] = []
    for difference in _differences(here, there, name, rtol, atol):
        if len(found) == _MOST:
            found.append("... and more")
            break
        found.append(difference)
    return found


def comparable(value: Any) -> bool:
    """Whether something can be said about it."""
    if isinstance(value, Mapping):
        return all(map(comparable, value.values()))
    if isinstance(value, list | tuple):
        return all(map(comparable, value))
    return (
        isinstance(value, bool | int | float | complex | str | bytes | None)
        or _array(value) is not None
    )


def _differences(here: Any, there: Any, name: str, rtol: float, atol: float) -> Iterator[str]:
    a, b = _array(here), _array(there)
    if a is not None and b is not None:
        yield from _of_arrays(a, b, name, rtol, atol)
    elif _is_number(here) and _is_number(there):
        if not _close(here, there, rtol, atol):
            yield f"{name}: {here:.6g} here, {there:.6g} there"
    elif type(here).__name__ != type(there).__name__:
        yield f"{name}: {type(here).__name__} here, {type(there).__name__} there"
    elif isinstance(here, Mapping):
        for key in here.keys() | there.keys():
            place = f"{name}[{key!r}]"
            if key not in here or key not in there:
                yield f"{place}: only {'here' if key in here else 'there'}"
            else:
                yield from _differences(here[key], there[key], place, rtol, atol)
    elif isinstance(here, list | tuple):
        if len(here) != len(there):
            yield f"{name}: {len(here)} elements here, {len(there)} there"
            return
        for index, (one, other) in enumerate(zip(here, there, strict=True)):
            yield from _differences(one, other, f"{name}[{index}]", rtol, atol)
    elif isinstance(here, str | bytes) and here != there:
        yield f"{name}: {str(here)[:40]!r} here, {str(there)[:40]!r} there"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _close(here: float, there: float, rtol: float, atol: float) -> bool:
    if math.isnan(here) or math.isnan(there):
        return math.isnan(here) and math.isnan(there)
    return math.isclose(here, there, rel_tol=rtol, abs_tol=atol)


def _array(value: Any) -> Any:
    """An array of numbers, whatever library made it; None for anything else."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor):
        value = value.detach().cpu().numpy()
    elif "pandas" in sys.modules:
        pandas = sys.modules["pandas"]
        if isinstance(value, pandas.DataFrame | pandas.Series):
            value = value.to_numpy()
    if isinstance(value, numpy.generic):
        value = numpy.asarray(value)
    return value if isinstance(value, numpy.ndarray) else None


def _of_arrays(here: Any, there: Any, name: str, rtol: float, atol: float) -> Iterator[str]:
    import numpy as np

    if here.shape != there.shape:
        yield f"{name}: shape {here.shape} here, {there.shape} there"
        return
    if here.dtype.kind not in "biufc" or there.dtype.kind not in "biufc":
        if not (here == there).all():
            yield f"{name}: {int((here != there).sum())} of {here.size} elements differ"
        return
    close = np.isclose(here, there, rtol=rtol, atol=atol, equal_nan=True)
    if not close.all():
        apart = np.abs(here.astype(complex) - there.astype(complex))
        yield (
            f"{name}: {int((~close).sum())} of {here.size} elements differ, by"
            f" {float(np.nanmax(apart)):.3g} at most"
        )
