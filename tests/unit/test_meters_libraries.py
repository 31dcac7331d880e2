"""Trainings of real libraries are counted without a change of their code, and not twice."""

from __future__ import annotations

import pytest
from test_meters import printed

END = "\nprint(json.dumps(msgspec.to_builtins(meters.read())), file=out)\n"
QUIET = """
    import contextlib, os, sys
    os.environ.update(KERAS_BACKEND="torch", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    out, sys.stdout = sys.stdout, open(os.devnull, "w")
"""

KERAS = """
    import keras, numpy as np
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.ones((70, 3)), np.ones((70, 1))
    model.fit(*x, batch_size=32, epochs=4, verbose=0)
    model.evaluate(*x, verbose=0)
"""
LIGHTNING = """
    import logging, torch, pytorch_lightning as pl
    from torch.utils.data import DataLoader
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)
        def training_step(self, batch, index):
            return self.layer(batch).square().mean()
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)
    trainer = pl.Trainer(max_epochs=3, {bar}, logger=False,
                         enable_checkpointing=False, enable_model_summary=False, accelerator="cpu")
    trainer.fit(Model(), DataLoader(torch.ones(20, 3), batch_size=4))
"""
TRANSFORMERS = """
    import tempfile, torch, transformers
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)
        def forward(self, x, labels=None):
            return {"loss": (self.layer(x)[:, 0] - labels).square().mean()}
    data = [{"x": torch.ones(3), "labels": torch.tensor(1.0)} for _ in range(20)]
    args = transformers.TrainingArguments(tempfile.mkdtemp(), num_train_epochs=3, report_to=[],
        per_device_train_batch_size=4, disable_tqdm=%s, save_strategy="no", use_cpu=True)
    transformers.Trainer(Model(), args, train_dataset=data).train()
"""
XGBOOST = """
    import numpy as np, xgboost
    x = np.random.default_rng(0).random((50, 3))
    xgboost.train({}, xgboost.DMatrix(x, x[:, 0]), 12)
    xgboost.XGBRegressor(n_estimators=5).fit(x, x[:, 0])
"""
LIGHTGBM = """
    import numpy as np, lightgbm
    x = np.random.default_rng(0).random((50, 3))
    lightgbm.LGBMRegressor(n_estimators=7, verbose=-1).fit(x, x[:, 0])
"""
FASTPROGRESS = """
    from fastprogress.fastprogress import master_bar, progress_bar
    bar = master_bar(range(3))
    for epoch in bar:
        for batch in progress_bar(range(10), parent=bar):
            pass
"""


def loops(code: str) -> list[tuple[object, ...]]:
    """Source, unit, count, total and whether it is within another loop, of each."""
    import textwrap

    found = printed(textwrap.dedent(QUIET) + textwrap.dedent(code) + END)
    return [
        (it["source"], it["unit"], it["done"], it["total"], it.get("nested", False)) for it in found
    ]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (KERAS, [("keras", "epoch", 4, 4, False), ("keras", "step", 12, 12, True)]),
        (
            LIGHTNING.replace("{bar}", "enable_progress_bar=False"),
            [("lightning", "epoch", 3, 3, False), ("lightning", "step", 15, 15, True)],
        ),
        (
            TRANSFORMERS.replace("%s", "True"),
            [("transformers", "epoch", 3, 3, False), ("transformers", "step", 15, 15, True)],
        ),
        (XGBOOST, [("xgboost", "round", 12, 0, False), ("xgboost", "round", 5, 0, False)]),
        (LIGHTGBM, [("lightgbm", "round", 7, 0, False)]),
    ],
    ids=["keras", "lightning", "transformers", "xgboost", "lightgbm"],
)
def test_a_training_is_counted(code: str, expected: list[tuple[object, ...]]) -> None:
    assert loops(code) == expected


@pytest.mark.parametrize(
    "code",
    [
        LIGHTNING.replace("{bar}", "callbacks=[pl.callbacks.TQDMProgressBar()]"),
        TRANSFORMERS.replace("%s", "False"),
    ],
    ids=["lightning", "transformers"],
)
def test_what_has_a_bar_of_tqdm_is_counted_once(code: str) -> None:
    found = loops(code)
    assert {source for source, *_ in found} == {"tqdm"}
    assert 15 in {done for _, _, done, *_ in found} or {5} == {done for _, _, done, *_ in found}


def test_bars_of_fastprogress_are_counted() -> None:
    epoch, *batches = loops(FASTPROGRESS)
    assert epoch == ("fastprogress", "epoch", 3, 3, False)
    assert batches == [("fastprogress", "step", 10, 10, True)] * 3


def test_a_training_that_fails_and_one_that_is_counted_wrongly_do_no_harm() -> None:
    found = loops(
        """
        import numpy as np, xgboost
        class Stop(xgboost.callback.TrainingCallback):
            def after_iteration(self, model, epoch, log):
                if epoch == 3:
                    raise KeyError("mine")
        x = np.random.default_rng(0).random((50, 3))
        try:
            xgboost.train({}, xgboost.DMatrix(x, x[:, 0]), 9, callbacks=[Stop()])
        except KeyError:
            pass
        meters.begin()  # the next cell
        meters.track = None  # nothing can be counted
        assert xgboost.train({}, xgboost.DMatrix(x, x[:, 0]), 2).num_boosted_rounds() == 2
        """
    )
    assert found == []
