"""What a cell is expected to take, from what it has taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlinfra_sdk.catalog import Gpu
from mlinfra_sdk.ledger import Ledger, Price
from mlinfra_sdk.ledger.history import cell_key, estimate

A10 = Gpu("A10", 1)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    it = Ledger.open(tmp_path / "ledger.sqlite")
    yield it
    it.close()


def ran(ledger: Ledger, *seconds: float, gpu: Gpu = A10, cell: str = "c", **how: str) -> None:
    machine = ledger.intend_machine(
        name="m", provider="p", price=Price(1, "s", "2026-11-25"), gpu=gpu.name, gpu_count=gpu.count
    )
    for took in seconds:
        run = ledger.open_run(machine, notebook=how.get("notebook", "n"), cell=cell)
        ledger.close_run(run, status=how.get("status", "done"), seconds=took)


def test_nothing_is_expected_without_a_history(ledger: Ledger) -> None:
    assert estimate(ledger, "n", "c", A10) is None
    ran(ledger, 10, status="error")
    ran(ledger, 10, gpu=Gpu("H100", 1))
    ran(ledger, 10, gpu=Gpu("A10", 2))
    ran(ledger, 10, cell="other")
    ran(ledger, 10, notebook="other")
    assert estimate(ledger, "n", "c", A10) is None
    assert estimate(ledger, "n", "", A10) is None


def test_one_run_has_no_error(ledger: Ledger) -> None:
    ran(ledger, 60)
    found = estimate(ledger, "n", "c", A10)
    assert found is not None and found.describe(3_600_000) == (
        "Estimate by 1 earlier run of this cell: 1m, $0.0600 (its error is not known)."
    )


def test_the_error_is_that_of_one_more_run(ledger: Ledger) -> None:
    ran(ledger, *[500] * 5, 50, 70, *[60] * 8)  # only the last ten count
    found = estimate(ledger, "n", "c", A10)
    assert found is not None and (found.seconds, found.runs) == (60, 10)
    # Their deviation is sqrt(200 / 9) = 4.71 s, times sqrt(1.1): also the mean is uncertain.
    assert found.error == pytest.approx(4.944, abs=0.001)
    assert found.describe(3_600_000) == (
        "Estimate by 10 earlier runs of this cell: 1m ± 4.9s, $0.0600 ± $0.0049."
    )
    assert found.describe(None) == "Estimate by 10 earlier runs of this cell: 1m ± 4.9s."


def test_a_cell_is_known_by_its_code() -> None:
    assert cell_key("x = 1  \ny = 2\n") == cell_key("\nx = 1\ny = 2")
    assert cell_key("x = 1") != cell_key("x = 2")
    assert cell_key("  \n") == ""
