"""Trainings by Hugging Face's Trainer and by Lightning lose their machine and go on from the files
that these wrote, one by Keras from a loop's checkpoints: bitwise the same, as docs/checkpoints.md
says."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from faulty import Client, Recorder, apart, client
from test_checkpoints import Killer, lose_machine, store

from mlinfra_sdk.checkpoints.manifest import Manifest

BEGINNING = """
import os, time, warnings
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
warnings.filterwarnings("ignore", module="pytorch_lightning|lightning|torch|transformers")
from pathlib import Path
import torch
torch.manual_seed(0)
torch.set_num_threads(1)
x = torch.randn(64, 10, generator=torch.Generator().manual_seed(1))
seen = []
def step_done(number, wait_at):
    seen.append(number)
    while number == wait_at and not os.path.exists({go!r}):
        time.sleep(0.01)
"""
TRAINER = """
import transformers
config = transformers.GPT2Config(vocab_size=50, n_positions=10, n_embd=32, n_layer=2, n_head=2)
model = transformers.GPT2LMHeadModel(config)  # with dropout
data = [dict(input_ids=it, labels=it) for it in (x.abs() * 15).long().clamp(max=49)]
class Steps(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        step_done(state.global_step, 13)
args = transformers.TrainingArguments(
    {folder!r}, num_train_epochs=3, per_device_train_batch_size=8, save_steps=5, use_cpu=True,
    report_to=[], disable_tqdm=True, logging_strategy="no",
)
trainer = transformers.Trainer(model, args, train_dataset=data, callbacks=[Steps()])
trainer.train(resume_from_checkpoint=any(Path({folder!r}).glob("checkpoint-*")))
final = b"".join(it.numpy().tobytes() for it in model.state_dict().values())
"""
LIGHTNING = """
import logging
import pytorch_lightning as pl
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(10, 32), torch.nn.Dropout(0.2), torch.nn.Linear(32, 10))
    def on_train_epoch_start(self):
        torch.manual_seed(self.current_epoch)  # Lightning saves no generators
    def training_step(self, batch, index):
        return (self.layers(batch) - batch).square().mean()
    def on_train_batch_end(self, *_):
        step_done(self.global_step, 20)
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]
model = Model()
saver = pl.callbacks.ModelCheckpoint({folder!r}, save_last=True)
trainer = pl.Trainer(
    max_epochs=4, accelerator="cpu", logger=False, callbacks=[saver],
    enable_progress_bar=False, enable_model_summary=False,
)
loader = torch.utils.data.DataLoader(x, batch_size=8, generator=torch.Generator())
path = Path({folder!r}, "last.ckpt")
trainer.fit(model, loader, ckpt_path=str(path) if path.exists() else None)
final = b"".join(it.numpy().tobytes() for it in model.state_dict().values())
"""

KERAS = """
os.environ["KERAS_BACKEND"] = "torch"
import keras
keras.utils.set_random_seed(0)
data = x.numpy()
layers = [keras.layers.Dense(32, "relu"), keras.layers.Dropout(0.2), keras.layers.Dense(10)]
model = keras.Sequential([keras.Input((10,)), *layers])
model.compile(keras.optimizers.Adam(0.01), "mse")
model.evaluate(data[:8], data[:8], verbose=0)  # else the first fit draws numbers to build it
import mlinfra_sdk
state = dict(model=model, rng="all")  # its dropout uses torch's global generator
for epoch in mlinfra_sdk.checkpoint({folder!r}).loop(range(8), state=state, every=1):
    model.fit(data, data, batch_size=8, shuffle=False, verbose=0)
    step_done(epoch + 1, 5)
final = b"".join(it.tobytes() for it in model.get_weights())
"""


def has(pattern: str) -> Callable[[Manifest], bool]:
    return lambda manifest: any(re.fullmatch(pattern, it.path) for it in manifest.files)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with apart(tmp_path_factory.mktemp("frameworks")) as home:
        yield home


@pytest.fixture(scope="module")
def far(home: Path) -> Iterator[Client]:
    with client(isolate=True) as it:
        it.session.request = msgspec.structs.replace(it.session.request, sync=True)
        yield it


def train(
    far: Client, code: str, folder: str, go: Path, recorder: Recorder
) -> tuple[list[int], bytes]:
    """Steps that the process which came to the end has done, and its weights."""
    request = far.session.request
    far.session.request = msgspec.structs.replace(request, checkpoints=folder)
    cell = f"{BEGINNING}\ndef train():\n" + "".join(
        f"    {line}\n" for line in f"{code}\nreturn final".splitlines()
    )
    cell = cell.replace("{go!r}", repr(str(go))).replace("{folder!r}", repr(folder))
    far.namespace.clear()
    try:
        far.run(f"{cell.replace('{{', '{').replace('}}', '}')}\nfinal = train()", recorder).get()
    finally:
        far.session.request = request
    return far.namespace["seen"], far.namespace["final"]


@pytest.mark.parametrize(
    ("module", "code", "enough", "count", "goes_on_with"),
    [
        ("transformers", TRAINER, has(r"checkpoint-10/trainer_state\.json"), 24, {11}),
        ("pytorch_lightning", LIGHTNING, has(r"epoch=1-step=16\.ckpt"), 32, {9, 17}),
        ("keras", KERAS, lambda manifest: manifest.step >= 4, 8, {5}),
    ],
    ids=["transformers", "lightning", "keras"],
)
def test_a_training_goes_on_elsewhere(
    module: str,
    code: str,
    enough: Callable[[Manifest], bool],
    count: int,
    goes_on_with: set[int],
    far: Client,
    home: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    name = re.sub(r"\W", "-", request.node.callspec.id)
    go = tmp_path / "go"
    go.touch()
    steps, whole = train(far, code, f"whole-{name}", go, Recorder())
    assert steps == list(range(1, count + 1))

    go.unlink()

    def come_so_far(saved: str, step: int) -> bool:
        newest = store(home).latest(saved)
        return newest is not None and enough(newest)

    recorder = Killer(go, lambda: lose_machine(home), come_so_far)
    steps, final = train(far, code, name, go, recorder)
    assert "[The " in recorder.text and "goes on from checkpoint" in recorder.text
    assert steps[0] in goes_on_with and steps == list(range(steps[0], count + 1))
    assert final == whole
