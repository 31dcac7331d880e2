"""Process-global state that follows the cells (random numbers, options, working directory...)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Adapter:
    """One piece of process-global state.

    ``read()`` gives it as opaque bytes (equal bytes: equal state) or None where its module is not
    loaded. ``write(data)`` sets it; where the module is not loaded yet this happens when it is.
    After a write compare with a fresh ``read()``, not with what was written: each side keeps what
    only it has (filters of its own libraries, options of another version).
    ``same_machine``: meaningful only where both sides share machine and file system.
    """

    name: str
    read: Callable[[], bytes | None]
    write: Callable[[bytes], None]
    same_machine: bool = False


AMBIENT: dict[str, Adapter] = {}


def read_all(same_machine: bool) -> dict[str, bytes]:
    """The state of every adapter that applies and whose module is loaded here."""
    raise NotImplementedError


def write_all(values: Mapping[str, bytes]) -> list[str]:
    """Write each value; return one line of text for each that could not be set."""
    raise NotImplementedError
