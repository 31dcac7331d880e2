"""What a front end shows must not depend on where the cells run."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from transparency import MLINFRA, NAMES, Run, Shares, compare, described, verdicts

# Every cell runs on the machine once; the benchmark has the other half of alternating, too.
WAYS = ("remote", "alternating")
_shares = Shares()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_a_local_run(name: str, tmp_path: Path) -> None:
    found = anyio.run(verdicts, name, tmp_path, MLINFRA, WAYS)
    _shares.add(found)
    assert all(set(cells) == {None} for cells in found.values()), described(name, found)


def test_nearly_all_cells_are_equal(capsys: pytest.CaptureFixture[str]) -> None:
    """The promise is 99 %, over all the notebooks that have just run."""
    with capsys.disabled():
        print(f"\n{_shares}")
    assert all(_shares.percent(way) >= 99 for way, total in _shares.total.items() if total)


def test_the_comparison_sees_differences() -> None:
    stream = {"type": "stream", "name": "stdout", "text": "a"}
    view = {"type": "display_data", "data": {"view": {"model_id": "m1"}}}
    other_view = {"type": "display_data", "data": {"view": {"model_id": "m2"}}}
    expected = Run(["x"], [[stream, view]], {"m1": {"value": 1}})
    assert compare(expected, Run(["x"], [[stream, other_view]], {"m2": {"value": 1}})) == [None]
    different = [
        Run(["x"], [[view, stream]], {"m1": {"value": 1}}),
        Run(["x"], [[stream, other_view]], {"m2": {"value": 2}}),
        Run(["x"], [[{**stream, "text": "b"}, view]], {"m1": {"value": 1}}),
        Run(["x"], [[stream]], {"m1": {"value": 1}}),
        Run(["x"], [], {}),
    ]
    assert all(any(compare(expected, found)) for found in different)
