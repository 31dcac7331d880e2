"""A value that lives on a machine and is fetched when its content is first used here."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from mlinfra_sdk.errors import NotTransferable, RemoteValueLost
from mlinfra_sdk.namespace.delta import RemoteRef
from mlinfra_sdk.objects.realm import Foreign, resolve

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class RemoteValue(Foreign):
    """Stands for a value on a machine.

    Cells that run there use the value in place. :meth:`pull` fetches it; so does the first use of
    its content here (an attribute, an item, a call, arithmetic, numpy...).
    """

    __slots__ = (
        "_mlinfra_lost",
        "_mlinfra_name",
        "_mlinfra_pull",
        "_mlinfra_ref",
        "_mlinfra_value",
    )

    _mlinfra_name: str
    _mlinfra_ref: RemoteRef
    _mlinfra_pull: Callable[[RemoteValue], Any]
    _mlinfra_lost: str
    _mlinfra_value: Any

    def __init__(self, name: str, ref: RemoteRef, pull: Callable[[RemoteValue], Any]) -> None:
        _set(self, "_mlinfra_name", name)
        _set(self, "_mlinfra_ref", ref)
        _set(self, "_mlinfra_token", ref.token)
        _set(self, "_mlinfra_pull", pull)
        _set(self, "_mlinfra_lost", "")

    def pull(self) -> Any:
        """Fetch the value. All variables that hold this RemoteValue hold the value afterwards."""
        try:
            return self._mlinfra_value
        except AttributeError:
            pass
        ref = self._mlinfra_ref
        if self._mlinfra_lost:
            raise RemoteValueLost(
                f"The value of {self._mlinfra_name!r} ({ref.type}) lived on a machine and is gone: "
                f"{self._mlinfra_lost}.",
                hint="Run the cell that made it again.",
            )
        if ref.reason:
            raise NotTransferable(
                f"{self._mlinfra_name!r} cannot be used here: {ref.reason.rstrip('.')}.",
                hint="Use it in a remote cell.",
            )
        value = self._mlinfra_pull(self)
        _set(self, "_mlinfra_value", value)
        return value

    def _mlinfra_lose(self, reason: str) -> None:
        """The machine's kernel is gone."""
        _set(self, "_mlinfra_lost", reason)

    def _mlinfra_reduce(self) -> tuple[Any, ...]:
        try:
            return _same, (self._mlinfra_value,)
        except AttributeError:
            text = f"the value of {self._mlinfra_name!r} ({self._mlinfra_ref.type})"
            reason = self._mlinfra_lost or "It lives on another machine; call its pull() first."
            return resolve, (self._mlinfra_token, text, reason)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _same, (self.pull(),)

    def __repr__(self) -> str:
        try:
            return repr(self._mlinfra_value)
        except AttributeError:
            pass
        ref = self._mlinfra_ref
        parts = [ref.type]
        if ref.shape:
            parts.append(f"shape {ref.shape}")
        if ref.dtype:
            parts.append(ref.dtype)
        if ref.nbytes:
            parts.append(_size(ref.nbytes))
        how = "remote: .pull() fetches it"
        if self._mlinfra_lost:
            how = f"lost: {self._mlinfra_lost}"
        elif ref.reason:
            how = f"remote only: {ref.reason}"
        return f"<{', '.join(parts)} ({how})>"

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any] | None:
        """A widget is shown here, too: the front end talks to it where it lives."""
        widget = self._mlinfra_ref.widget
        if not widget or self._mlinfra_lost:
            return None
        view = {"version_major": 2, "version_minor": 0, "model_id": widget}
        return {"application/vnd.jupyter.widget-view+json": view, "text/plain": repr(self)}

    def __str__(self) -> str:
        return repr(self) if self._mlinfra_ref.reason else str(self.pull())

    def __format__(self, spec: str) -> str:
        return format(str(self) if self._mlinfra_ref.reason else self.pull(), spec)

    def __getattr__(self, name: str) -> Any:
        # Front ends probe for these names before they show a value; that is not use of it.
        if name.startswith(("_repr_", "_ipython_", "_mlinfra_")):
            raise AttributeError(name)
        return getattr(self.pull(), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.pull(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.pull(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.pull()(*args, **kwargs)

    def __dir__(self) -> list[str]:
        return ["pull"]

    __hash__ = Foreign.__hash__

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        import numpy

        return numpy.asarray(self.pull(), *args, **kwargs)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return getattr(ufunc, method)(*_pulled(inputs), **_pulled(kwargs))

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return function(*_pulled(args), **_pulled(kwargs))

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*_pulled(args), **_pulled(kwargs or {}))


_set = object.__setattr__


def _same(value: Any) -> Any:
    return value


def _pulled(value: Any) -> Any:
    """Arguments with the values of the RemoteValues among them."""
    kind = type(value)
    if kind is RemoteValue:
        return value.pull()
    if kind in (list, tuple):
        return kind(map(_pulled, value))
    if kind is dict:
        return {key: _pulled(item) for key, item in value.items()}
    return value


def _size(nbytes: int) -> str:
    size = float(nbytes)
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def _delegate(name: str) -> None:
    function: Callable[..., Any] | None = getattr(operator, f"__{name}__", None)
    if function is None:
        function = _BUILTINS[name]
    chosen = function

    def method(self: RemoteValue, *args: Any) -> Any:
        return chosen(self.pull(), *_pulled(args))

    setattr(RemoteValue, f"__{name}__", method)


def _delegate_reflected(name: str) -> None:
    function = getattr(operator, f"__{name}__")
    setattr(
        RemoteValue,
        f"__r{name}__",
        lambda self, other: function(_pulled(other), self.pull()),
    )


_BUILTINS: dict[str, Callable[..., Any]] = {
    "len": len,
    "iter": iter,
    "next": next,
    "reversed": reversed,
    "bool": bool,
    "int": int,
    "float": float,
    "complex": complex,
    "round": round,
    "divmod": divmod,
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value, *args: type(value).__exit__(value, *args),
    "await": lambda value: value.__await__(),
    "aiter": lambda value: value.__aiter__(),
    "anext": lambda value: value.__anext__(),
}
_ARITHMETIC = tuple(
    "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()  # noqa: SIM905
)
_OTHERS = tuple(
    "getitem setitem delitem contains lt le gt ge eq ne neg pos abs invert index".split()  # noqa: SIM905
)

for _name in (*_BUILTINS, *_ARITHMETIC, *(f"i{name}" for name in _ARITHMETIC), *_OTHERS):
    _delegate(_name)
for _name in _ARITHMETIC:
    _delegate_reflected(_name)
