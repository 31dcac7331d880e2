from __future__ import annotations

from collections import deque

import pytest

from mlinfra_sdk.link.pace import LEAST, MOST, START, Pace


def simulate(rate: float, latency: float, seconds: float) -> list[tuple[float, float, float]]:
    """A sender that always has more, over a path with an endless buffer.

    Returns (time, delay in the buffer, rate that arrived) for each acknowledgement.
    """
    pace = Pace()
    now = free_at = 0.0
    number = 0
    arrived = 0
    under_way: deque[tuple[float, int, int, float]] = deque()
    history = []
    while now < seconds:
        while pace.open:
            number += 1
            count = pace.fragment
            pace.add(count)
            pace.mark(number, now)
            free_at = max(now, free_at) + count / rate
            under_way.append((free_at + latency, number, count, free_at - now))
        now, last, count, waited = under_way.popleft()
        arrived += count
        pace.acknowledged(last, now)
        history.append((now, waited, arrived / now))
    return history


@pytest.mark.parametrize("rate", [0.5e6, 2e6, 20e6, 200e6])
@pytest.mark.parametrize("latency", [0.001, 0.05, 0.3])
def test_the_path_is_used_but_its_buffers_are_not_filled(rate: float, latency: float) -> None:
    history = simulate(rate, latency, seconds=30)
    least = LEAST / rate
    settled = [waited for now, waited, _ in history if now > 10]
    assert sorted(settled)[len(settled) // 2] < 0.15 + least
    assert max(settled) < 0.5 + 2 * least
    enough = min(rate, MOST / (latency + 0.01))
    assert history[-1][2] > 0.8 * enough


def test_it_starts_small_and_opens_up_on_a_fast_path() -> None:
    pace = Pace()
    assert pace.limit == START
    now = 0.0
    for number in range(1, 200):
        pace.add(pace.limit)
        assert not pace.open
        pace.mark(number, now)
        now += 0.001
        pace.acknowledged(number, now)
        assert pace.open
    assert pace.limit == MOST


def test_one_delay_is_counted_once() -> None:
    """Everything that was under way during a stall arrives late: that is one reason, not many."""
    pace = Pace()
    pace.add(1000)
    pace.mark(1, 0.0)
    pace.acknowledged(1, 0.01)
    limit = pace.limit
    for number in range(2, 50):
        pace.add(1000)
        pace.mark(number, 1.0)
    for number in range(2, 50):
        pace.acknowledged(number, 3.0)
    assert pace.limit == limit // 2
