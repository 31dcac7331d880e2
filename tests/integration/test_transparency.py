"""What a front end shows must not depend on where the cells run."""

from __future__ import annotations

from pathlib import Path

import pytest
from transparency import NAMES, WAYS, Run, compare, possible, run


@pytest.fixture(scope="module")
def local_runs() -> dict[str, Run]:
    return {}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("way", "name"),
    [(way, name) for way in WAYS for name in NAMES if way != "local" and possible(name, way)],
)
def test_outputs_are_those_of_a_local_run(
    way: str, name: str, local_runs: dict[str, Run], tmp_path: Path
) -> None:
    if name not in local_runs:
        local_runs[name] = run(name, "local", tmp_path / "local")
    expected = local_runs[name]
    verdicts = compare(expected, run(name, way, tmp_path / "other"))
    wrong = [verdict for verdict in verdicts if verdict is not None]
    assert not wrong, f"{len(wrong)} of {len(verdicts)} cells differ\n" + "\n".join(wrong)


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
