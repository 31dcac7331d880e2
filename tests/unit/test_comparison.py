"""What a comparison says of what was measured; the work itself is in the integration tests."""

from __future__ import annotations

import csv
import io
import json
import re

import numpy as np
import pytest

from mlinfra_sdk.comparison import Comparison, Plan, TargetResult, Trial
from mlinfra_sdk.comparison.agreement import comparable, differences
from mlinfra_sdk.comparison.chart import render
from mlinfra_sdk.comparison.isolation import isolated
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.namespace.analysis import CellNames
from mlinfra_sdk.worker.run_usage import DISTURBED, Loop, RunUsage


def result(target: str, start: float, rate: float, *, price: int | None = 0) -> TargetResult:
    """100 epochs after ``start`` seconds, at so many a second."""
    loop = Loop("train", "epoch", 100, 100, 100 / rate, rate, "tqdm", spread=0.1)
    inner = Loop("batch", "it", 1000, 1000, 100 / rate, 10 * rate, "tqdm", nested=True)
    usage = RunUsage(100 / rate, 9, 0.9, 1.0, 2, 5 << 20, loops=[inner, loop], bound="one thread")
    trial = Trial({"start": start, "compute": 100 / rate}, usage, {"_": 1.0})
    return TargetResult(target, rate=price, price_source="a list of 2026-11-01", trials=[trial])


def test_break_even_cost_and_speed_up() -> None:
    """100 s of start against 1 and 5 epochs a second: 100 s + n / 5 = n at n = 125."""
    comparison = Comparison(
        [result("local", 0.0, 1.0), result("cloud", 100.0, 5.0, price=3_600_000)]
    )
    local, cloud = comparison.targets
    found = comparison.all_figures(cloud)
    assert found["speed_up"].value == 5.0 and found["speed_up"].kind == "measured"
    assert (
        found["break_even"].value == pytest.approx(125) and found["break_even"].kind == "estimated"
    )
    assert found["first_result"].value == 120.0
    assert found["cost"].value == pytest.approx(3.6 * 120 / 3600)
    assert found["cost"].kind == "estimated" and "2026-11-01" in found["cost"].source
    assert found["cost_per_epoch"].value == pytest.approx(3.6 / 3600 / 5)
    assert comparison.all_figures(local)["cost"].value == 0
    text = str(comparison)
    assert (
        "From about 125 epochs on, cloud is quicker" in text and "leave out the first tenth" in text
    )
    assert list(found)[-2:] == ["speed_up", "break_even"]


@pytest.mark.parametrize(
    "rate, sentence",
    [(0.5, "was not faster"), (1.02, "was about as fast"), (0.97, "was about as fast")],
)
def test_no_break_even_where_the_rates_do_not_differ_clearly(rate: float, sentence: str) -> None:
    comparison = Comparison([result("local", 0.0, 1.0), result("cloud", 1.0, rate)])
    assert comparison.break_even(comparison["cloud"]) is None
    assert sentence in str(comparison)


def test_nothing_is_concluded_from_a_disturbed_measurement() -> None:
    comparison = Comparison([result("local", 0.0, 1.0), result("cloud", 1.0, 5.0)])
    comparison["cloud"].trials[0].usage.bound = DISTURBED  # type: ignore[union-attr]
    assert comparison.break_even(comparison["cloud"]) is None
    text = str(comparison)
    assert "cloud was measured while other programs kept it busy." in text and "quicker" not in text


def test_an_unknown_price_is_no_amount() -> None:
    comparison = Comparison([result("local", 0.0, 1.0), result("box", 1.0, 2.0, price=None)])
    assert "cost" not in comparison.all_figures(comparison["box"])


def test_export() -> None:
    comparison = Comparison([result("local", 0.0, 1.0), result("cloud", 1.0, 2.0)])
    comparison["cloud"].compared, comparison["cloud"].differences = 1, ["loss: 1 here, 2 there"]
    rows = list(csv.DictReader(io.StringIO(comparison.to_csv())))
    assert {row["target"] for row in rows} == {"local", "cloud"}
    assert {row["kind"] for row in rows} == {"measured", "estimated"}
    assert len(comparison.to_frame()) == len(rows)
    document = json.loads(comparison.to_json())
    assert document["targets"]["cloud"]["differences"] == ["loss: 1 here, 2 there"]
    assert document["figures"][0]["target"] == "local"


def test_the_chart_stands_alone() -> None:
    comparison = Comparison(
        [result("local", 0.0, 1.0), result("<b>", 1.0, 2.0), TargetResult("late")]
    )
    comparison.targets[1].trials[0].output = "$x$ <script>"
    html = render(comparison)
    assert "<script" not in html and "<b>" not in html and "$x$" not in html
    assert "late" in html and "waiting" in html and "125" not in html
    widths = [float(width) for width in re.findall(r"height:10px;width:([\d.]+)px", html)]
    assert max(widths) == 320.0
    assert not re.search(r"https?:|url\(", html)


def test_a_target_that_failed_is_told() -> None:
    failed = TargetResult("cloud", trials=[Trial({"compute": 1.0}, error="ValueError: no")])
    failed.error = "ValueError: no"
    comparison = Comparison([result("local", 0.0, 1.0), failed])
    assert "cloud: ValueError: no" in str(comparison)
    assert comparison.break_even(failed) is None and "first_result" not in failed.figures()


@pytest.mark.parametrize(
    "here, there, expected",
    [
        (1.0, 1.0 + 1e-5, []),
        (1.0, 1.1, ["x: 1 here, 1.1 there"]),
        (float("nan"), float("nan"), []),
        ({"a": [1, 2]}, {"a": [1, 3]}, ["x['a'][1]: 2 here, 3 there"]),
        ({"a": 1}, {}, ["x['a']: only here"]),
        ([1], [1, 2], ["x: 1 elements here, 2 there"]),
        ("a", "b", ["x: 'a' here, 'b' there"]),
        (np.zeros(3), np.zeros(4), ["x: shape (3,) here, (4,) there"]),
        (np.zeros(3), np.array([0, 0, 2.5]), ["x: 1 of 3 elements differ, by 2.5 at most"]),
        (np.array(["a", "b"]), np.array(["a", "c"]), ["x: 1 of 2 elements differ"]),
        (np.float32(1), 1.0, ["x: float32 here, float there"]),
        (1, "1", ["x: int here, str there"]),
        (object(), object(), []),
    ],
)
def test_differences(here: object, there: object, expected: list[str]) -> None:
    assert differences(here, there, "x") == expected


def test_differences_of_tensors_and_frames() -> None:
    import pandas as pd
    import torch

    assert differences(torch.ones(2, requires_grad=True), torch.ones(2)) == []
    assert "1 of 2 elements" in differences(torch.ones(2), torch.tensor([1.0, 9.0]), "t")[0]
    assert differences(pd.DataFrame({"a": [1]}), pd.DataFrame({"a": [1]})) == []
    assert len(differences(list(range(100)), list(range(1, 101)), "x")) == 21
    assert comparable({"a": torch.ones(1)}) and not comparable([object()])


def test_isolation_copies_data_once_and_keeps_what_is_shared_together() -> None:
    shared = np.arange(3)
    namespace = {
        "np": np,
        "a": {"x": shared},
        "b": shared,
        "unused": np.zeros(9),
        "lock": __import__("threading").Lock(),
        "helper": lambda: deeper,  # noqa: F821
        "deeper": [1],
    }
    reads = frozenset({"np", "a", "b", "helper"})
    copy, left_out = isolated(namespace, CellNames(reads, frozenset(), frozenset(), False))
    assert set(copy) == {"np", "a", "b", "helper", "deeper"} and left_out == []
    assert copy["np"] is np and copy["helper"] is namespace["helper"]
    assert copy["a"]["x"] is copy["b"] and copy["b"] is not shared
    copy["b"][0] = 9
    copy["deeper"].append(2)
    assert shared[0] == 0 and namespace["deeper"] == [1]
    _, left_out = isolated(
        namespace, CellNames(frozenset({"lock", "b"}), frozenset(), frozenset(), False)
    )
    assert left_out == ["lock"]


@pytest.mark.parametrize(
    "on, repeat, message",
    [
        (["local"], 1, "one target; a comparison needs two"),
        (["local", "local"], 1, "one target twice"),
        (["local", "nowhere"], 1, "no target 'nowhere'"),
        (["local", "ssh:box"], 0, "repeat=0"),
    ],
)
def test_a_bad_plan(on: list[str], repeat: int, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        Plan(on, repeat).requests()


def test_the_gpu_is_for_the_others() -> None:
    local, other = Plan(["local", "ssh:box"], settings={"gpu": "A10", "idle": "5m"}).requests()
    assert local.gpu is None and str(other.gpu) == "A10" and local.idle == 300
