"""Bars of tqdm, which are told of when they begin and end; their counts are read by ``loops``."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from .loops import meters


def patch_tqdm(module: ModuleType) -> None:
    """Also keep the last state of each bar that is closed: short ones come and go unseen."""
    bar: Any = module.__dict__["tqdm"]
    close, init = bar.close, bar.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if not getattr(self, "disable", True):
            meters.begun(self)

    def closing(self: Any) -> None:
        if not getattr(self, "disable", True):
            meters.closed(self)
        close(self)

    for ours, theirs in ((__init__, init), (closing, close)):
        ours.__name__, ours.__qualname__ = theirs.__name__, theirs.__qualname__
        ours.__doc__, ours.__module__ = theirs.__doc__, theirs.__module__
    bar.__init__, bar.close = __init__, closing
