from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sides import Sides

from mlinfra_sdk.errors import NotTransferable, RemoteValueLost
from mlinfra_sdk.namespace.sync import RemoteValue


@pytest.fixture
def sides(tmp_path: Path) -> Sides:
    """``big`` is a RemoteValue of np.arange(100_000.0)."""
    sides = Sides(tmp_path, eager_limit=100_000)
    sides.local("import numpy as np")
    report = sides.remote("big = np.arange(100_000.0)")
    assert report.remote == ["big"]
    return sides


def test_it_shows_what_it_is_without_fetching(sides: Sides) -> None:
    big = sides.ns["big"]
    moved = sides.moved
    assert repr(big) == (
        "<numpy.ndarray, shape 100000, float64, 781.2 KiB (remote: .pull() fetches it)>"
    )
    assert "pull" in dir(big)
    assert not hasattr(big, "_repr_html_") and not hasattr(big, "_ipython_display_")
    assert big._repr_mimebundle_() is None
    assert sides.moved == moved and type(sides.ns["big"]) is RemoteValue


def test_it_is_used_in_place(sides: Sides) -> None:
    moved = sides.moved
    assert sides.remote("big[5] = -1; float(big.sum())").extra == {"_": 4999950000.0 - 6}
    assert sides.moved == moved and sides.inputs.groups == []
    assert sides.ns["big"].pull()[5] == -1


def test_pull_binds_the_value_to_all_its_names(sides: Sides) -> None:
    sides.local("alias = big")
    remote = sides.ns["big"]
    value = remote.pull()
    assert type(value) is np.ndarray and value[99] == 99
    assert sides.ns["big"] is value and sides.ns["alias"] is value and remote.pull() is value
    assert repr(remote) == repr(value)


def test_a_pulled_value_is_not_sent_back(sides: Sides) -> None:
    sides.ns["big"].pull()
    moved = sides.moved
    assert sides.remote("float(big[7])").extra == {"_": 7.0}
    assert sides.inputs.groups == [] and sides.moved == moved
    sides.local("big[7] = 70")
    assert sides.remote("float(big[7])").extra == {"_": 70.0}
    array = sides.ns["big"]
    sides.namespace.eager_limit = 10_000_000
    sides.remote("big[8] = 80")
    assert sides.ns["big"] is array and array[8] == 80


USES: list[tuple[str, Any]] = [
    ("big.shape", (100_000,)),
    ("len(big)", 100_000),
    ("float(big[3])", 3.0),
    ("float((big + 1)[0])", 1.0),
    ("float((1 - big)[0])", 1.0),
    ("float((np.ones(1) * big)[2])", 2.0),
    ("float(np.sum(big[:3]))", 3.0),
    ("float(np.mean(big))", 49999.5),
    ("float(np.concatenate([big, big])[-1])", 99999.0),
    ("np.asarray(big).dtype.name", "float64"),
    ("float(next(iter(big)))", 0.0),
    ("5.0 in big", True),
    ("bool((big == big).all())", True),
    ("float(-big[1])", -1.0),
    ("f'{big[1]:.1f}'", "1.0"),
    ("str(big)[:4]", "[0.0"),
    ("isinstance(big.pull(), np.ndarray)", True),
]


@pytest.mark.parametrize(("use", "expected"), USES)
def test_any_use_of_the_content_fetches_it(sides: Sides, use: str, expected: Any) -> None:
    if expected == "[0.0":
        expected = str(np.arange(100_000.0))[:4]
    assert sides.local(use) == expected
    assert type(sides.ns["big"]) is np.ndarray


def test_changes_of_the_content_reach_it(sides: Sides) -> None:
    held = sides.ns["big"]
    held[0] = 5
    held.flags.writeable = False
    assert sides.ns["big"][0] == 5 and not sides.ns["big"].flags.writeable
    sides.local("big = big + 1")
    assert sides.ns["big"][0] == 6


def test_functions_and_models_can_be_called(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    sides = Sides(tmp_path, eager_limit=1000)
    sides.local("import torch")
    report = sides.remote("m = torch.nn.Linear(50, 50); first = m.weight")
    assert sorted(report.remote) == ["first", "m"], "what shares objects stays together"
    assert sides.ns["m"](torch.ones(50)).shape == (50,)
    assert torch.sum(sides.ns["first"]).shape == ()


def test_a_part_of_a_remote_value_stays_with_it(tmp_path: Path) -> None:
    sides = Sides(tmp_path, eager_limit=1000)
    sides.remote("big = [['x'], list(range(5000))]")
    report = sides.remote("part = big[0]; size = len(big)")
    assert report.remote == ["part"] and sides.ns["size"] == 2
    sides.remote("part.append('y')")
    assert sides.remote("big[0]").extra["_"].pull() == ["x", "y"]


def test_pickle_and_copy_take_the_value(sides: Sides) -> None:
    held = sides.ns["big"]
    assert pickle.loads(pickle.dumps(held))[3] == 3
    assert type(copy.deepcopy(held)) is np.ndarray


def test_it_travels_inside_of_other_objects(sides: Sides) -> None:
    sides.local("box = {'items': [big]}")
    moved = sides.moved
    assert sides.remote("box['items'][0] is big").extra == {"_": True}
    assert sides.moved == moved


def test_it_is_lost_with_its_kernel(sides: Sides) -> None:
    sides.namespace.forget("the kernel was restarted")
    with pytest.raises(RemoteValueLost, match=r"'big'.*the kernel was restarted"):
        sides.ns["big"].sum()
    assert "lost" in repr(sides.ns["big"])


def test_on_another_machine_it_says_where_it_is(sides: Sides, tmp_path: Path) -> None:
    other = Sides(tmp_path / "other")
    other.ns["big"] = sides.ns["big"]
    error = other.remote("big.sum()").error
    assert isinstance(error, NotTransferable) and "pull" in str(error)


def test_the_worker_forgets_what_nobody_holds(sides: Sides) -> None:
    token = sides.ns["big"]._mlinfra_token
    sides.local("del big")
    sides.remote("1")
    realm = sides.worker.namespace._realm  # type: ignore[union-attr]
    assert realm.resolve(token) is None and not realm.held


def test_the_same_value_is_one_remote_value(sides: Sides) -> None:
    sides.remote("again = big; pair = [big]")
    assert sides.ns["again"] is sides.ns["big"]
    assert type(sides.ns["pair"]) is RemoteValue


def test_a_large_result_of_a_cell(sides: Sides) -> None:
    report = sides.remote("big * 2")
    assert type(report.extra["_"]) is RemoteValue
    assert float(report.extra["_"][4]) == 8.0


def test_a_mutated_variable_that_became_too_large(sides: Sides) -> None:
    sides.local("items = []")
    assert sides.remote("items.append(np.zeros(100_000))").remote == ["items"]
    assert len(sides.ns["items"]) == 1
