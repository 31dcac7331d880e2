from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from mlinfra_sdk.worker.interrupts import Interrupts


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    before = signal.getsignal(signal.SIGINT)
    it = Interrupts()
    it.install()
    yield it
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_it_is_raised_in_the_users_work_only(interrupts: Interrupts) -> None:
    interrupt()
    with interrupts.raised(time.monotonic()), pytest.raises(KeyboardInterrupt):
        interrupt()
    interrupt()


def test_one_that_came_before_the_beginning_is_raised_there(interrupts: Interrupts) -> None:
    handed_over = time.monotonic()
    interrupt()
    with pytest.raises(KeyboardInterrupt), interrupts.raised(handed_over):
        raise AssertionError("this must not begin")


def test_one_that_came_too_late_is_forgotten(interrupts: Interrupts) -> None:
    with interrupts.raised(time.monotonic()):
        pass
    interrupt()
    with interrupts.raised(time.monotonic()):
        pass
