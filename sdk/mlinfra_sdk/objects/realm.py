"""What one side of a session knows about objects that cannot leave their process."""

from __future__ import annotations

import secrets
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, NoReturn, TypeVar

from mlinfra_sdk.errors import NotTransferable

T = TypeVar("T")


class WeakIdTable(Generic[T]):
    """Maps objects by identity to values for as long as the objects live."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Any], T]] = {}

    def __setitem__(self, obj: object, value: T) -> None:
        key = id(obj)
        entries = self._entries
        self._entries[key] = (weakref.ref(obj, lambda _: entries.pop(key, None)), value)

    def get(self, obj: object) -> T | None:
        entry = self._entries.get(id(obj))
        return entry[1] if entry is not None and entry[0]() is obj else None


class Realm:
    """One namespace in one process: gives tokens to objects that stay here.

    ``ns`` is the user namespace that becomes the globals of notebook functions.
    """

    def __init__(self, ns: dict[str, Any]) -> None:
        self.ns = ns
        self.id = secrets.token_hex(8)
        self.arriving: dict[str, Any] = {}
        """Variables that are about to be bound in ``ns``."""
        self.states: list[tuple[Callable[[Any, Any], None], Any, dict[str, Any]]] = []
        """(function, object, state) of what the last graph has updated where it was."""
        self.held: dict[int, str] = {}
        """Tokens of the objects that are held for the other side, by id."""
        self._by_token: dict[str, Callable[[], Any]] = {}
        self._token_of: dict[int, str] = {}
        self._count = 0
        self.origins: WeakIdTable[str] = WeakIdTable()
        """Tokens of objects that stand for one elsewhere."""
        self.home_devices: WeakIdTable[str] = WeakIdTable()
        """Tensors that live on a device which is not here."""

    def token(self, obj: object) -> str:
        """The token of an object, for as long as the object lives (for good where that cannot be
        told)."""
        token = self._token_of.get(id(obj))
        if token is not None and self.resolve(token) is obj:
            return token
        self._count += 1
        token = f"{self.id}.{self._count}"
        try:
            self._by_token[token] = weakref.ref(obj, lambda _: self._by_token.pop(token, None))
        except TypeError:
            self._by_token[token] = lambda: obj
        self._token_of[id(obj)] = token
        return token

    def hold(self, obj: object, token: str = "") -> str:
        """Keeps an object alive under its token (or the given one) until :meth:`release`."""
        token = token or self.token(obj)
        self._by_token[token] = lambda: obj
        self._token_of[id(obj)] = token
        self.held[id(obj)] = token
        return token

    def release(self, token: str) -> None:
        """No one elsewhere holds this token any more."""
        obj = self.resolve(token)
        self._by_token.pop(token, None)
        self.held.pop(id(obj), None)
        self._token_of.pop(id(obj), None)

    def variable(self, name: str) -> Any:
        """The value that a variable has or is about to get."""
        return self.arriving[name] if name in self.arriving else self.ns[name]

    def resolve(self, token: str) -> object | None:
        """The object of a token, or None if it is gone."""
        reference = self._by_token.get(token)
        return None if reference is None else reference()


class _Receiving(threading.local):
    realm: Realm | None = None


_receiving = _Receiving()


@contextmanager
def receiving(realm: Realm) -> Iterator[None]:
    """While objects are rebuilt in ``realm``."""
    outer = _receiving.realm
    _receiving.realm = realm
    realm.states = []
    try:
        yield
    finally:
        _receiving.realm = outer


def current_realm() -> Realm:
    """The realm in which objects are being rebuilt."""
    if _receiving.realm is None:
        raise NotTransferable(
            "This data was written by mlinfra for its own kernels.",
            hint="Load it through a session.",
        )
    return _receiving.realm


class Foreign:
    """Base of what stands for an object that stayed in another realm."""

    __slots__ = ("__weakref__", "_mlinfra_token")

    _mlinfra_token: str

    def _mlinfra_reduce(self) -> tuple[Any, ...]:
        """What is pickled in its place."""
        raise NotImplementedError


class Stub(Foreign):
    """Stands for an object that is not here; any use of it raises NotTransferable.

    Sent back to where it comes from it becomes the original object again.
    """

    __slots__ = ("_mlinfra_reason", "_mlinfra_text")

    _mlinfra_text: str
    _mlinfra_reason: str

    def __init__(self, token: str, text: str, reason: str = "") -> None:
        for name, value in (("token", token), ("text", text), ("reason", reason)):
            object.__setattr__(self, f"_mlinfra_{name}", value)

    def _mlinfra_reduce(self) -> tuple[Any, ...]:
        return resolve, (
            self._mlinfra_token,
            self._mlinfra_text,
            self._mlinfra_reason,
        )

    def __repr__(self) -> str:
        return f"<not here: {self._mlinfra_text}>"

    __hash__ = Foreign.__hash__

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("_repr_", "_ipython_", "__")):  # probing is not use
            raise AttributeError(name)
        _raise(self)


def resolve(token: str, text: str, reason: str = "") -> Any:
    """The object itself where it comes from, elsewhere a stub."""
    obj = current_realm().resolve(token)
    return Stub(token, text, reason) if obj is None else obj


def _raise(stub: Stub, *args: object, **kwargs: object) -> NoReturn:
    if stub._mlinfra_reason:
        raise NotTransferable(f"Here is not {stub._mlinfra_text}.", hint=stub._mlinfra_reason)
    raise NotTransferable(
        f"This is {stub._mlinfra_text}, which cannot leave the process that made it.",
        hint="Create it in the cell that uses it.",
    )


_USES = (
    "setattr delattr call iter next len getitem setitem delitem contains enter exit await aiter "
    "anext aenter aexit bool int float complex index str lt le gt ge eq ne add radd sub rsub mul "
    "rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow matmul rmatmul and rand or ror xor "
    "rxor lshift rlshift rshift rrshift neg pos abs invert array"
)
for _name in _USES.split():
    setattr(Stub, f"__{_name}__", _raise)
