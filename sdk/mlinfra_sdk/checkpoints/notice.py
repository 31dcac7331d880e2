"""Word that this process is going to be ended soon, for loops that save at their next step."""

from __future__ import annotations

_given = ""


def give(text: str) -> None:
    """Say so, in a sentence for the user; may be called from any thread. Each new sentence makes
    every loop save once more."""
    global _given
    _given = text


def pending() -> str:
    """The last word, or nothing."""
    return _given
