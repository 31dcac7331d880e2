"""Which names of the notebook a cell may need, bind or delete."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple


class CellNames(NamedTuple):
    """What a cell does with the names of the notebook.

    ``reads``: available names that it may read (or delete) before it surely binds them.
    ``binds``, ``deletes``: names that it may bind or delete (a hint: the worker finds out itself).
    ``everything``: it may look at any name (``globals()``, ``%who``, ``exec`` of unknown code).
    """

    reads: frozenset[str]
    binds: frozenset[str]
    deletes: frozenset[str]
    everything: bool


def cell_names(transformed_code: str, available: Container[str], raw: str = "") -> CellNames:
    """The names of one cell, after IPython's input transformation; never raises on bad code.

    ``raw`` is the text before the transformation, used where ``transformed_code`` cannot be
    parsed. Only ``reads`` is filtered by ``available``.
    """
    raise NotImplementedError
