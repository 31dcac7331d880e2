"""Identity-preserving write-back: old objects take over the content of their new versions."""

from __future__ import annotations

from collections.abc import Mapping


def graft(new_root: object, pairs: Mapping[int, object]) -> object:
    """Put the graph of ``new_root`` in the place of the old one and return what stands for it.

    ``pairs`` maps ``id(new)`` to the old object it came from. An old object that can be changed in
    place takes over the content of its new version, and every reference in the new graph to a
    paired object becomes a reference to the old one. Where in-place is impossible the new object
    is used. To graft several names at once pass a dict of them (it is changed in place).
    The caller keeps the new objects alive during the call.
    """
    raise NotImplementedError
