"""A few seeds of `python -m benchmarks.money`: one for each thing that can happen to a client."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from engines import Modal

from benchmarks.money import Scenario, World, busy, calls, clocks, full, killed

LENGTH = 5.0
"""About how many seconds a client lives that nobody disturbs."""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    from emulators.modal import emulator

    with ExitStack() as stack:
        service = stack.enter_context(emulator())
        engine = Modal(tmp_path_factory.mktemp("engine"), service)
        yield World(engine, stack, tmp_path_factory.mktemp("money"), LENGTH)


@pytest.mark.parametrize("scenario", [killed, calls, clocks, full, busy])
def test_no_machine_and_no_charge_is_lost_or_doubled(world: World, scenario: Scenario) -> None:
    if scenario is clocks and not _can_fake_time():
        pytest.skip("libfaketime is not installed")
    if scenario is full and os.getuid() != 0:
        pytest.skip("only root may mount")
    seed = random.randrange(1 << 30)
    assert scenario(world, random.Random(seed), seed)["problems"] == [], f"seed {seed}"


def _can_fake_time() -> bool:
    from emulators.modal.world import faketime

    try:
        return bool(faketime("+1h"))
    except FileNotFoundError:
        return False
