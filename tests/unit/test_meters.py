"""Loops are counted without a change of their code."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from mlinfra_sdk import track
from mlinfra_sdk.meters import Meter, meters, outermost


def printed(code: str) -> list[dict[str, object]]:
    """What a process prints as JSON: its ``meters.read()`` where the code says so."""
    start = """
        import json, msgspec
        from mlinfra_sdk.meters import meters, watch
        watch()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


def test_bars_of_tqdm_are_read_while_they_go_on_and_kept_when_they_are_closed() -> None:
    epoch, first, second = printed(
        """
        from tqdm.auto import tqdm
        for epoch in tqdm(range(2), desc="epoch", unit="epoch", mininterval=0, miniters=1):
            for batch in tqdm(range(40), leave=False, mininterval=0, miniters=1):
                if epoch and batch == 9:
                    print(json.dumps(msgspec.to_builtins(meters.read())))
        """
    )
    assert (epoch["label"], epoch["unit"], epoch["source"]) == ("epoch", "epoch", "tqdm")
    assert (epoch["done"], epoch["total"]) == (1, 2)
    assert "ended" not in epoch and "nested" not in epoch
    assert first["done"] == first["total"] == 40 and first["ended"] and first["nested"]
    assert second["done"] == 9 and "ended" not in second and second["nested"]


def test_bars_that_are_not_shown_are_not_counted_and_others_do_no_harm() -> None:
    assert printed(
        """
        from tqdm import tqdm
        list(tqdm(range(3), disable=True))
        bar = tqdm(total=None, initial=5)
        bar.update(2)
        class Odd(tqdm):
            unit = property(lambda self: 1 / 0, lambda self, value: None)
        print(json.dumps([m.done for m in meters.read()]))
        """
    ) == [2]


def test_track_counts_samples_of_what_has_been_worked_on() -> None:
    meters.begin()
    loop = track(range(4), samples=32, label="train")
    next(loop)
    next(loop)
    (found,) = meters.read()
    assert (found.label, found.unit, found.done, found.total) == ("train", "samples", 32, 128)
    assert not found.ended
    loop.close()
    (found,) = meters.read()
    assert found.ended and found.done == 32
    meters.begin()
    assert meters.read() == []
    with pytest.raises(ValueError, match="above 0"):
        next(track([1], samples=0))


def test_the_outermost_loop_and_what_is_left_of_it() -> None:
    meters.begin()
    outer, inner = track(range(4)), track(range(9))
    next(outer)
    next(inner)
    assert [str(it) for it in meters.read()] == ["0/4 it", "0/9 it"]
    found = outermost(meters.read())
    assert found is not None and found.total == 4 and found.left is None
    outer.close()
    found = outermost(meters.read())
    assert found is not None and found.total == 9
    inner.close()
    assert outermost(meters.read()) is None
    half = Meter(1, "", "steps", done=1_000_000, total=2_000_000, seconds=60.0, source="track")
    assert half.left == 60.0 and str(half) == "1000000/2000000 steps"
    endless = Meter(1, "", "it", done=3, total=0, seconds=60.0, source="track")
    assert endless.left is None and str(endless) == "3 it"


def test_an_iterable_without_length_and_an_error_in_the_loop() -> None:
    meters.begin()
    with pytest.raises(ZeroDivisionError):
        for element in track(iter([1, 0])):
            1 / element
    (found,) = meters.read()
    assert (found.done, found.total, found.unit) == (1, 0, "it")
