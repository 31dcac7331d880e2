"""How the ``mlinfra`` command speaks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def say(text: str) -> None:
    """A sentence beside the output proper."""
    print(f"mlinfra: {text}", file=sys.stderr)


def console() -> Console:
    """A console for tables; into a file or a pipe nothing is cut off."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 1000
    return Console(highlight=False, markup=False, emoji=False, width=width)


def print_json(value: object) -> None:
    """For ``--json``."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
