"""Loops that go on where they were: what they hold stays the same objects, and the result is
bitwise that of a run that was not cut off."""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import mlinfra_sdk
from mlinfra_sdk.checkpoints import announce, device_copies, notice
from mlinfra_sdk.errors import CheckpointError, RequestError

CUTS = (1, 13, 17)
"""Steps after which a training run is cut off; an epoch has 16."""


class Cut(Exception):
    """The run ends here."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)
    return tmp_path


class Noisy(TensorDataset):
    """Augments with the generator of its process."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return x + 0.01 * torch.randn(x.shape), y


def torch_run(name: str, cut: int = 0, workers: int = 0, own: bool = False) -> tuple[Any, ...]:
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    generator = torch.Generator().manual_seed(5) if own else None
    loader = DataLoader(
        Noisy(x, (x.sum(1) > 0).long()), 32, shuffle=True, num_workers=workers, generator=generator
    )
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 64),
        torch.nn.BatchNorm1d(64),
        torch.nn.Dropout(0.3),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 2),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=5)
    losses: list[float] = []
    state = dict(
        model=model, optimizer=optimizer, schedule=schedule, scaler=scaler, rng="all",
        losses=losses, best=9.0, generator=generator,
    )  # fmt: skip
    ckpt = mlinfra_sdk.checkpoint(name)
    steps = 0
    for _ in ckpt.loop(range(2), state=state, every=1):
        for inputs, labels in ckpt.loop(loader, every=3):
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            state["best"] = min(state["best"], loss.item())
            steps += 1
            if steps == cut:
                raise Cut
        schedule.step()
    assert state["losses"] is losses and state["model"] is model
    weights = [it.numpy().tobytes() for it in model.state_dict().values()]
    return losses, weights, state["best"], optimizer.param_groups[0]["lr"], scaler.get_scale()


@pytest.mark.parametrize("options", [{}, {"own": True}, {"workers": 1}], ids=str)
def test_torch(options: dict[str, Any]) -> None:
    whole = torch_run("whole", **options)
    for cut in (14,) if options else CUTS:
        with pytest.raises(Cut):
            torch_run(f"cut-{cut}", cut, **options)
        assert torch_run(f"cut-{cut}", **options) == whole


def sklearn_run(name: str, cut: int = -1) -> bytes:
    from sklearn.linear_model import SGDClassifier

    generator = np.random.default_rng(1)
    model = SGDClassifier(random_state=1)
    curve = np.zeros(60)
    state = {"model": model, "generator": generator, "curve": curve}
    for step in mlinfra_sdk.checkpoint(name).loop(range(60), state=state, every=7):
        x = generator.normal(size=(20, 5))
        model.partial_fit(x, x.sum(1) > 0, classes=[False, True])
        curve[step] = model.score(x, x.sum(1) > 0)
        if step == cut:
            raise Cut
    assert state["model"] is model and state["curve"] is curve
    return bytes(model.coef_.tobytes() + model.intercept_.tobytes() + curve.tobytes())


@pytest.mark.parametrize(("room", "held"), [(10**9, 3), (600_000, 2), (0, 0)])
def test_copies_on_the_device_are_brought_while_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, room: int, held: int
) -> None:
    """The CPU takes the place of a GPU; `tests/gpu` has one."""
    may_come = threading.Event()
    brought: list[int] = []
    on_device: list[weakref.ref[Any]] = []
    bring = device_copies.DeviceCopy.bring

    def later(copy: device_copies.DeviceCopy, target: memoryview) -> None:
        assert may_come.wait(60)
        brought.append(copy.nbytes)
        on_device.append(weakref.ref(copy._copy))
        bring(copy, target)

    monkeypatch.setattr(device_copies, "KINDS", ("cpu",))
    monkeypatch.setattr(device_copies, "room", lambda device: room)
    monkeypatch.setattr(device_copies.DeviceCopy, "bring", later)

    def made() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        wide = torch.randn(256, 512)
        return {
            "plain": torch.randn(256, 256),
            "turned": torch.randn(256, 256).T,
            "gaps": wide[:, ::2],
            "small": torch.randn(3),
            "flags": torch.randn(70) > 0,
        }

    state: dict[str, Any] = {**made(), "tied": None}
    state["tied"] = state["plain"].detach()
    ckpt = mlinfra_sdk.checkpoint("device")
    ckpt.save(state)
    for tensor in state.values():
        tensor.zero_()
    may_come.set()
    ckpt.wait()
    assert brought == [256 * 256 * 4] * held
    assert [it() for it in on_device] == [None] * held  # also before garbage is collected
    ckpt.restore(state)
    for name, tensor in made().items():
        assert state[name].equal(tensor), name
    assert state["tied"].equal(state["plain"])


def test_numpy_and_scikit_learn() -> None:
    whole = sklearn_run("whole")
    for cut in CUTS:
        with pytest.raises(Cut):
            sklearn_run(f"cut-{cut}", cut)
        assert sklearn_run(f"cut-{cut}") == whole


def xgboost_run(name: str, sampling: bool, cut: int = -1) -> tuple[bytes, list[float]]:
    """One booster that grows; or, with sampling, one made of the last for each round, because its
    samplers' generators live in the booster's process only."""
    xgboost = pytest.importorskip("xgboost")
    x = np.random.default_rng(0).normal(size=(400, 8)).astype("f4")
    data = xgboost.DMatrix(x, label=(x.sum(1) > 0).astype("f4"))
    parameters = {"objective": "binary:logistic", "nthread": 1, "seed": 3}
    booster = None if sampling else xgboost.Booster(parameters, [data])
    losses: list[float] = []
    state: dict[str, Any] = {"booster": booster, "losses": losses}
    for step in mlinfra_sdk.checkpoint(name).loop(range(20), state=state, every=5):
        if sampling:
            drawn = {**parameters, "subsample": 0.7, "colsample_bytree": 0.8, "seed": step}
            state["booster"] = xgboost.train(drawn, data, 1, xgb_model=state["booster"])
        else:
            state["booster"].update(data, step)
        losses.append(float(state["booster"].eval(data).rpartition(":")[2]))
        if step == cut:
            raise Cut
    assert state["booster"] is booster or sampling
    return bytes(state["booster"].save_raw("ubj")), losses


@pytest.mark.parametrize("sampling", [False, True])
def test_xgboost(sampling: bool) -> None:
    whole = xgboost_run("whole", sampling)
    for cut in CUTS:
        with pytest.raises(Cut):
            xgboost_run(f"cut-{cut}", sampling, cut)
        assert xgboost_run(f"cut-{cut}", sampling) == whole


def test_boosters_that_do_not_exist_yet() -> None:
    """``train`` makes a new one each time; its predictions go on from the saved one's."""
    lightgbm = pytest.importorskip("lightgbm")
    x = np.random.default_rng(0).normal(size=(400, 8))
    labels = x.sum(1) > 0

    def run(cut: int = -1) -> Any:
        state: dict[str, Any] = {"booster": None}
        for step in mlinfra_sdk.checkpoint("lightgbm").loop(range(9), state=state, every=1):
            state["booster"] = lightgbm.train(
                {"verbose": -1, "num_threads": 1}, lightgbm.Dataset(x, labels), 1,
                init_model=state["booster"],
            )  # fmt: skip
            if step == cut:
                raise Cut
        return state["booster"]

    with pytest.raises(Cut):
        run(5)
    assert run().num_trees() == 9


class Plain:
    """A class of the user's own."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self.myself = self


def test_plain_objects_and_containers_stay_themselves() -> None:
    def fresh() -> dict[str, Any]:
        net = torch.nn.Linear(2, 2)
        return {
            "plain": Plain(), "nets": {"g": net, "more": [torch.nn.Linear(1, 1)]}, "seen": {1},
            "random": random.Random(1), "tensor": torch.zeros(70_000), "names": ["a"],
            "generator": torch.Generator(), "legacy": np.random.RandomState(1), "count": 0,
            "strided": torch.zeros(300, 300).T, "half": torch.zeros(3, dtype=torch.bfloat16),
        }  # fmt: skip

    saved = fresh()
    saved["plain"].values.append(7)
    saved["seen"].add(2)
    saved["names"][:] = ["b", "c"]
    saved["count"] = 5
    saved["tensor"].normal_()
    saved["strided"].normal_()
    saved["half"].fill_(1.5)
    draws = [saved["random"].random, saved["legacy"].rand]
    for draw in draws:
        draw()
    ckpt = mlinfra_sdk.checkpoint("plain")
    ckpt.save(saved, wait=True)
    state = fresh()
    before = dict(state)
    deep = state["plain"].values, state["nets"]["g"], state["nets"]["more"][0], state["nets"]
    assert ckpt.restore(state) is not None
    assert all(state[key] is before[key] for key in state if key != "count")
    assert deep[0] is state["plain"].values == [7] and state["plain"].myself is state["plain"]
    assert deep[3] is state["nets"] and deep[1] is state["nets"]["g"]
    assert torch.equal(deep[1].weight, saved["nets"]["g"].weight)
    assert torch.equal(deep[2].bias, saved["nets"]["more"][0].bias)
    assert (state["seen"], state["names"], state["count"]) == ({1, 2}, ["b", "c"], 5)
    for key in ("tensor", "strided", "half"):
        assert torch.equal(state[key], saved[key]) and state[key].stride() == saved[key].stride()
    assert [draw() for draw in draws] == [state["random"].random(), state["legacy"].rand()]
    ckpt.restore(state, number=1)


def test_what_a_module_keeps_beside_its_state() -> None:
    def fresh() -> torch.nn.Module:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
        module.register_buffer("hidden", torch.zeros(3), persistent=False)
        return module

    saved, module = fresh(), fresh()
    saved.get_buffer("hidden").fill_(4)
    saved[1].eval()
    saved[0].weight.requires_grad_(False)
    ckpt = mlinfra_sdk.checkpoint("module")
    ckpt.save({"module": saved}, wait=True)
    ckpt.restore({"module": module})
    assert module.get_buffer("hidden").tolist() == [4, 4, 4]
    assert [module.training, module[0].training, module[1].training] == [True, True, False]
    assert [it.requires_grad for it in module.parameters()] == [False, True]


def test_what_does_not_fit_is_said() -> None:
    ckpt = mlinfra_sdk.checkpoint("fit")
    ckpt.save({"model": torch.nn.Linear(2, 2), "n": 1}, wait=True)
    with pytest.raises(CheckpointError, match="'model' of the checkpoint does not fit"):
        ckpt.restore({"model": torch.nn.Linear(3, 2)})
    with pytest.raises(CheckpointError, match="another kind of object than list"):
        ckpt.restore({"model": []})
    with pytest.warns(RuntimeWarning, match="has no other"):
        ckpt.restore({"n": 0, "other": 1})
    with pytest.raises(CheckpointError, match=r"'lambda' .* cannot be saved"):
        ckpt.save({"lambda": (it for it in ())})
    for every in (0, "often", 1.5, True):
        with pytest.raises(RequestError, match="every"):
            next(iter(ckpt.loop([1], state={"n": 1}, every=every)))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="has no state"):
        next(iter(ckpt.loop([1])))


def steps(ckpt: Any, state: dict[str, Any], cut: int = 0) -> Iterator[int]:
    for step in ckpt.loop(range(6), state=state, every=1):
        state["n"] += 1
        yield step
        if cut and state["n"] == cut:
            return


def test_a_finished_run_starts_anew_unless_it_was_cut_off_after_its_loop() -> None:
    assert list(steps(mlinfra_sdk.checkpoint("a"), {"n": 0}, cut=3)) == [0, 1, 2]
    assert list(steps(mlinfra_sdk.checkpoint("a", resume=False), {"n": 0}, 2)) == [0, 1]
    assert list(steps(mlinfra_sdk.checkpoint("a"), {"n": 0})) == [1, 2, 3, 4, 5]
    try:
        announce.rerun(True)
        assert list(steps(mlinfra_sdk.checkpoint("a"), state := {"n": 0})) == []
        assert state == {"n": 6}
    finally:
        announce.rerun(False)
    assert list(steps(mlinfra_sdk.checkpoint("a"), {"n": 0})) == [0, 1, 2, 3, 4, 5]


def test_a_notice_saves_at_the_next_step(capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = mlinfra_sdk.checkpoint("notice")
    state = {"n": 0}
    try:
        for step in ckpt.loop(range(5), state=state, every="1h"):
            state["n"] += 1
            if step == 2:
                notice.give("The machine ends in 30 s.")
            if step == 3:
                assert [it.step for it in ckpt.checkpoints()] == [3]
    finally:
        notice.give("")
    assert (
        "The machine ends in 30 s. A checkpoint has been saved at step 3."
        in capsys.readouterr().err
    )
