"""What a cell is expected to take, from what it and others have taken."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlinfra_sdk.ledger import Ledger, Measurement, Price
from mlinfra_sdk.ledger.history import cell_key
from mlinfra_sdk.predict import Past, Place, Prediction, Used, calibrate, estimate, predict
from mlinfra_sdk.predict.calibration import Calibration
from mlinfra_sdk.predict.hardware import guess

HERE, BOX, A10 = Place("local"), Place("ssh:box"), Place("modal", "A10", 1)
FIGURES = Calibration(100.0, 20.0, 2, 0.0, "a processor")


def sure(prediction: Prediction | None) -> Prediction:
    assert prediction is not None
    return prediction


def test_nothing_is_known_of_a_cell_that_never_ran() -> None:
    assert predict("c", A10, []) is None
    assert predict("c", A10, [Past("other", A10, 10.0)]) is None
    assert predict("c", BOX, [Past("c", HERE, 10.0)]) is None  # nor is anything of that machine


def test_a_cell_takes_what_it_took_and_more_runs_make_it_surer() -> None:
    first = sure(predict("c", A10, [Past("c", A10, 60.0)]))
    assert first.seconds == pytest.approx(60) and first.basis == "1 run of this cell on A10"
    assert first.low < 55 and first.high > 65
    steady = sure(predict("c", A10, [Past("c", A10, 60.0 + n % 2) for n in range(9)]))
    assert (steady.high - steady.low) < (first.high - first.low) / 2
    assert sure(predict("c", Place("other cloud", "A10", 1), [Past("c", A10, 60.0)])) == first
    assert predict("c", Place("modal", "A10", 2), [Past("c", A10, 60.0)]) is None


def test_only_the_latest_runs_count() -> None:
    past = [*[Past("c", A10, 500.0)] * 5, *[Past("c", A10, 60.0)] * 10]
    assert sure(predict("c", A10, past)).seconds == pytest.approx(60)


def test_the_spread_of_all_cells_is_learned() -> None:
    source = random.Random(1)

    def past(spread: float) -> list[Past]:
        noise = [Past(f"other {n % 4}", HERE, math.exp(source.gauss(2, spread))) for n in range(40)]
        return [*noise, Past("c", HERE, 60.0)]

    wild, tame = sure(predict("c", HERE, past(0.5))), sure(predict("c", HERE, past(0.01)))
    assert wild.high / wild.low > 2.5 * tame.high / tame.low


def test_other_cells_show_how_machines_compare() -> None:
    past = [Past("c", HERE, 60.0)]
    widths = []
    for number in range(4):
        past += [Past(f"o{number}", HERE, 10.0), Past(f"o{number}", BOX, 20.0 + number / 10)]
        found = sure(predict("c", BOX, past))
        widths.append(found.high / found.low)
    assert found.seconds == pytest.approx(120, rel=0.03)
    assert found.basis == "1 run on local and 4 other cells that ran on both"
    assert widths == sorted(widths, reverse=True)


def test_cells_shown_beat_figures() -> None:
    def wrong(one: Place, other: Place) -> object:
        return guess(Used(), "", "A10", None, FIGURES)

    past = [Past("c", HERE, 60.0)]
    alone = sure(predict("c", A10, past, wrong))  # type: ignore[arg-type]
    assert (
        alone.basis == "1 run on local and figures of processor and GPU alone, if it uses the GPU"
    )
    assert alone.high / alone.low > 5  # it says how little that is
    for number in range(5):
        past += [Past(f"o{number}", HERE, 10.0), Past(f"o{number}", A10, 9.0)]
    assert sure(predict("c", A10, past, wrong)).seconds == pytest.approx(54, rel=0.25)  # type: ignore[arg-type]


def test_guesses_by_figures() -> None:
    busy = Used(cores=2.0, cores_here=2.0)
    more, fewer = guess(busy, "", "", 8.0, None), guess(busy, "", "", 1.0, None)
    assert more is not None and fewer is not None
    assert more.mean < 0 and fewer.mean == pytest.approx(math.log(2))
    idle = guess(Used(cores=0.2, cores_here=2.0), "", "", 8.0, None)
    assert idle is not None and idle.mean == 0
    asleep = guess(Used(cores=0.0, cores_here=2.0), "", "A10", None, FIGURES)
    assert asleep is not None and asleep.mean == 0  # a GPU does not make waiting quicker
    bound = Used(busy=1.0, memory_bound=True)
    memory = guess(bound, "A10", "A100-SXM-80GB", None, None)
    assert memory is not None and memory.mean == pytest.approx(math.log(600 / 2039))
    assert guess(Used(), "", "A10", None, None) is None  # this computer was never measured
    assert guess(Used(), "A10", "no such GPU", None, FIGURES) is None


def test_words() -> None:
    found = Prediction(60.0, 50.0, 72.0, "1 run of this cell on A10")
    assert found.describe(3_600_000) == (
        "Estimate from 1 run of this cell on A10: 1m (50s to 1m12s), $0.0600 ($0.0500 to $0.0720)."
    )
    assert found.describe(None) == "Estimate from 1 run of this cell on A10: 1m (50s to 1m12s)."


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    it = Ledger.open(tmp_path / "ledger.sqlite")
    yield it
    it.close()


def ran(ledger: Ledger, place: Place, seconds: float, cell: str = "c", **how: str) -> int:
    machine = ledger.intend_machine(
        name="m", provider=place.target, price=Price(1, "s", "2026-11-25"), gpu=place.gpu,
        gpu_count=place.count,
    )  # fmt: skip
    run = ledger.open_run(machine, notebook=how.get("notebook", "n"), cell=cell)
    ledger.close_run(run, status=how.get("status", "done"), seconds=seconds)
    return run


def test_the_ledger_is_the_memory(ledger: Ledger) -> None:
    ran(ledger, A10, 10, status="error")
    ran(ledger, A10, 10, cell="other")
    ran(ledger, A10, 10, notebook="other")
    assert estimate(ledger, "n", "c", [A10, HERE]) == [None, None]
    assert estimate(ledger, "n", "", [A10]) == [None]
    run = ran(ledger, HERE, 100)
    figures = {"cores_mean": 2.0, "cores_here": 2.0}
    ledger.measure(run, [Measurement(name=name, value=it) for name, it in figures.items()])
    gpu, here = estimate(ledger, "n", "c", [A10, HERE], here=FIGURES)
    assert sure(here).seconds == pytest.approx(100)
    assert sure(gpu).seconds < 100 < sure(gpu).high * 5
    # A cell that has run in the notebook's own kernel only.
    local = [Past("k", HERE, 30.0, Used(1.0, 2.0))]
    (found,) = estimate(ledger, "n", "k", [HERE], local=local)
    assert sure(found).seconds == pytest.approx(30)


def test_this_computer_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path))
    assert calibrate(measure=False) is None
    found = calibrate()
    assert found is not None and found.bandwidth > 0.1 and (found.gflops or 0) > 0.1
    assert calibrate(measure=False) == found == calibrate()
    path = tmp_path / "calibration.json"
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("not JSON")
    assert calibrate(measure=False) is None


def test_a_cell_is_known_by_its_code() -> None:
    assert cell_key("x = 1\n") == cell_key("\nx = 1  ") != cell_key("x = 2")
    assert cell_key("  ") == ""
