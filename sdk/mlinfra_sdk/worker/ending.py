"""In a kernel: the machine is going to end soon, and who wants to know it.

>>> def save(end):
...     print(f"{end.seconds:.0f} s left: {end.reason}")
>>> when_ending(save)
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from mlinfra_sdk.worker.watchdog import End

logger = logging.getLogger(__name__)

_hooks: list[Callable[[End], None]] = []


def when_ending(hook: Callable[[End], None]) -> None:
    """Call ``hook`` in a thread of its own when this kernel's machine is about to end, or what
    runs is about to be stopped (``cause`` is ``run``): :data:`~.watchdog.NOTICE` seconds before,
    or less if the limit is short. It is called again if the end was postponed meanwhile."""
    _hooks.append(hook)


def forget(hook: Callable[[End], None]) -> None:
    """Call it no longer."""
    _hooks.remove(hook)


def announce(end: End) -> None:
    """Call the hooks; what one raises is logged and keeps no other from its work."""
    for hook in list(_hooks):
        threading.Thread(target=_call, args=(hook, end), name="mlinfra-ending").start()


def _call(hook: Callable[[End], None], end: End) -> None:
    try:
        hook(end)
    except Exception:
        logger.exception("A hook for the end of the machine failed")
