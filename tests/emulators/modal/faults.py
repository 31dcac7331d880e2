"""What can be made to go wrong."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Faults:
    """Switches that a test sets; all are off at first."""

    capacity: bool = True
    """Whether there are machines. Without, a sandbox with a GPU is never scheduled."""
    refuse: str = ""
    """Sandboxes are refused with this text (RESOURCE_EXHAUSTED)."""
    unavailable: dict[str, int] = field(default_factory=dict)
    """How often a method still answers UNAVAILABLE."""
    disturbed: dict[str, tuple[str, int]] = field(default_factory=dict)
    """For a method how its calls go wrong (``before`` they are done, ``after``, or done ``twice``),
    and how many still do."""
    machine_clock: str = ""
    """What libfaketime makes of the clock in sandboxes, such as ``+1h``."""
    expired: int = 0
    """How many calls of the command router still find their token expired."""
    start_delay: float = 0.0
    """Seconds from the creation of a sandbox to its start."""
    image_log: str = ""
    """Images are not built; their build prints this and fails."""
    wrong_gpu: str = ""
    """Sandboxes get this GPU, whatever was asked for."""
    billed_earlier: float = 0.0
    """Seconds by which bills say that sandboxes ran earlier than they did: nobody waits an hour."""
    clock_ahead: float = 0.0
    """Seconds by which the service's clock differs from this computer's."""
    cut_after: int = 0
    """Cut the next stream of output once, after so many bytes."""
