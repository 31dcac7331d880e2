"""Pace: how much may be under way on a wire without filling the buffers along the path.

A path takes what it is given into buffers that may hold seconds of its bandwidth, and what is
urgent then waits behind it.  The delay until an acknowledgement shows how full they are.
"""

from __future__ import annotations

from collections import deque

QUEUE_LIMIT = 0.1
"""Delay in the path's buffers that is accepted, in seconds."""

LEAST = 64 << 10
START = 256 << 10
MOST = 32 << 20
_SMALLEST_FRAGMENT = 16 << 10


class Pace:
    """The limit of the bytes under way on one wire."""

    def __init__(self) -> None:
        self.limit = START
        self._sent = 0
        self._arrived = 0
        self._shortest = float("inf")
        self._calm_after = 0
        self._marks: deque[tuple[int, int, float]] = deque()

    @property
    def open(self) -> bool:
        """Whether more may be sent."""
        return self._sent - self._arrived < self.limit

    @property
    def fragment(self) -> int:
        """Largest fragment that still leaves gaps for what is urgent, in bytes."""
        return max(_SMALLEST_FRAGMENT, self.limit >> 2)

    def add(self, count: int) -> None:
        """``count`` bytes are about to be sent."""
        self._sent += count

    def mark(self, number: int, now: float) -> None:
        """All that was added goes out now; DATA ``number`` is the last of it."""
        self._marks.append((number, self._sent, now))

    def acknowledged(self, number: int, now: float) -> None:
        """DATA ``number`` has arrived."""
        marks = self._marks
        if not marks or marks[0][0] > number:
            return
        while marks and marks[0][0] <= number:
            _, total, sent_at = marks.popleft()
        limited = self._sent - self._arrived >= self.limit // 2
        gained = total - self._arrived
        self._arrived = total
        delay = now - sent_at
        self._shortest = min(self._shortest, delay)
        queue = delay - self._shortest
        if queue <= QUEUE_LIMIT:
            if limited:
                # Doubles each round trip until the path is known, then feels its way.
                self.limit = min(MOST, self.limit + (gained >> 3 if self._calm_after else gained))
        elif total > self._calm_after:
            # Once for all that is under way already: its delay says nothing new.
            wanted = self._shortest + QUEUE_LIMIT / 2
            self.limit = max(LEAST, int(self.limit * max(0.5, wanted / delay)))
            self._calm_after = self._sent
