"""What a sync says of itself."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """What a sync has done. Sizes are in bytes."""

    sent: int = 0
    removed_there: int = 0
    received: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    listed: list[tuple[str, int]] = field(default_factory=list)
    """Files that stayed on the machine because of their size."""
    warnings: list[str] = field(default_factory=list)

    @property
    def went(self) -> list[str]:
        """What a card says of the files that went to the machine."""
        count = self.sent + self.removed_there
        return [f"{count} file{'s' if count > 1 else ''}"] if count else []


@dataclass(frozen=True)
class Move:
    """One line of what a sync would do."""

    what: str
    """``send``, ``fetch``, ``delete there``, ``delete here``, ``conflict`` or ``stays there``."""
    path: str
    size: int
