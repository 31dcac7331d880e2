"""Checkpoints leave the machine while a cell runs, which goes on from them on the next one."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from faulty import Client, Recorder, apart, client, kernels, processes
from live import until

import mlinfra_sdk
from mlinfra_sdk import cli, paths
from mlinfra_sdk.checkpoints.keep import Keep
from mlinfra_sdk.checkpoints.manifest import Manifest
from mlinfra_sdk.checkpoints.store import CheckpointStore
from mlinfra_sdk.errors import BudgetSpent, KernelDied, MachineLost, MlinfraError, RunDetached
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines import lifecycle
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.spec import Request

TRAIN = """
import os, time
import numpy as np
import mlinfra_sdk

generator = np.random.default_rng(0)
weights, losses = np.zeros(200_000), []
state = dict(generator=generator, weights=weights, losses=losses)
for step in mlinfra_sdk.checkpoint({name!r}).loop(range(60), state=state, every=10):
    while step == 45 and not os.path.exists({go!r}):
        time.sleep(0.01)
    weights += generator.normal(size=weights.shape)
    losses.append(float(weights.sum()))
    print(step)
total = weights.sum()
"""


class Killer(Recorder):
    """Does something once a checkpoint is safe that is ``enough``, as a rule that of step 40, then
    lets the cell go on."""

    def __init__(
        self,
        go: Path,
        act: Callable[[], None],
        enough: Callable[[str, int], bool] = lambda name, step: step == 40,
    ) -> None:
        super().__init__()
        self._go = go
        self._act = act
        self._enough = enough

    def safe(self, name: str, step: int, at: float) -> None:
        super().safe(name, step, at)
        if not self._go.exists() and self._enough(name, step):
            self._act()
            self._go.touch()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with apart(tmp_path_factory.mktemp("checkpoints")) as home:
        yield home


@pytest.fixture(scope="module")
def far(home: Path) -> Iterator[Client]:
    with client(isolate=True) as it:
        yield it


@pytest.fixture(scope="module")
def whole(far: Client, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed run gives."""
    go = tmp_path_factory.mktemp("go") / "go"
    go.touch()
    recorder = Recorder()
    far.run(TRAIN.format(name="whole", go=str(go)), recorder).get()
    assert recorder.text.split() == [str(step) for step in range(60)]
    return dict(far.namespace)


def store(home: Path) -> CheckpointStore:
    return CheckpointStore(paths.data_dir() / "checkpoints", ChunkStore(home / "store"))


def saved(home: Path, name: str) -> list[int]:
    return [it.step for it in store(home).history(name)]


def lose_machine(home: Path) -> None:
    """All at once, with its disk."""
    folders = list((home / "machines").iterdir())
    for process in processes(home):
        process.kill()
    for folder in folders:  # whoever misses it clears it away, too
        shutil.rmtree(folder, ignore_errors=True)


def lose_kernel(home: Path) -> None:
    for kernel in kernels(home):
        kernel.kill()


@pytest.mark.parametrize("kill", [lose_machine, lose_kernel])
def test_a_lost_run_goes_on(
    kill: Callable[[Path], None], far: Client, whole: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    recorder = Killer(tmp_path / "go", lambda: kill(home))
    machine = far.session.machine
    code = TRAIN.format(name=kill.__name__, go=str(tmp_path / "go"))
    far.run(code, recorder).get()
    assert far.namespace["losses"] == whole["losses"]
    assert (far.namespace["weights"] == whole["weights"]).all()
    before, marked, after = recorder.text.partition("[The ")
    line, _, rest = after.partition("]\n")
    assert f"goes on from checkpoint {kill.__name__} #" in line
    assert "(step 40)" in line and marked
    shown = [int(word) for word in before.split()]
    assert shown == list(range(len(shown))) and len(shown) >= 40
    assert [int(word) for word in rest.split() if word.isdigit()][-20:] == list(range(40, 60))
    assert saved(home, kill.__name__)[-1] == 60
    lost = far.session.machine
    assert machine is not None and lost is not None
    assert (machine.id == lost.id) == (kill is lose_kernel)


def test_who_stops_its_machine_from_elsewhere_gets_no_other_one(
    far: Client, home: Path, tmp_path: Path
) -> None:
    """As the side bar does, and the command: nothing more is spent, checkpoint or not."""
    machine = far.session.machine
    assert machine is not None
    ledger = Ledger.open()
    (known,) = (it for it in ledger.machines() if it.id == machine.id)

    def stop() -> None:
        threading.Thread(
            target=lambda: portal().call(lifecycle.stop_known(known, ledger, "stopped by the user"))
        ).start()

    recorder = Killer(tmp_path / "never" / "go", stop)
    recorder._go.parent.mkdir()
    code = TRAIN.format(name="stopped", go=str(tmp_path / "go"))
    with pytest.raises(MachineLost, match="stopped by"):
        far.run(code, recorder).get()
    until(lambda: not ledger.machines(active=True), "it to be closed")
    ledger.close()
    assert "begins again" not in recorder.text


FILES = """
import json, os, time
from pathlib import Path
root = Path("outputs")
done = sorted(root.glob("step-*/state.json"), key=lambda path: int(path.parent.name[5:]))
state = json.loads(done[-1].read_text()) if done else {{"step": 0, "total": 0}}
print("from", state["step"])
for step in range(state["step"], 30):
    state = {{"step": step + 1, "total": state["total"] + step}}
    if state["step"] % 10 == 0:
        folder = root / f"step-{{state['step']}}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights.bin").write_bytes(os.urandom(3_000_000))
        (folder / "state.json").write_text(json.dumps(state))
        while state["step"] == 20 and not os.path.exists({go!r}):
            time.sleep(0.01)
total = state["total"]
"""


class FilesKiller(Recorder):
    """Does something once files of the folder are safe, then lets the cell go on."""

    def __init__(self, go: Path, act: Callable[[], None]) -> None:
        super().__init__()
        self._go = go
        self._act = act
        self.names: list[str] = []

    def safe(self, name: str, step: int, at: float) -> None:
        self.names.append(name)
        if not self._go.exists():
            self._act()
            self._go.touch()


def test_files_that_code_saves_by_itself_survive_the_machine(
    far: Client, home: Path, tmp_path: Path
) -> None:
    request = far.session.request
    far.session.request = msgspec.structs.replace(request, checkpoints="outputs", sync=True)
    recorder = FilesKiller(tmp_path / "go", lambda: lose_machine(home))
    try:
        far.run(FILES.format(go=str(tmp_path / "go")), recorder).get()
    finally:
        far.session.request = request
    assert far.namespace["total"] == sum(range(30))
    first, marked, rest = recorder.text.partition("[The ")
    assert first.strip() == "from 0" and "goes on from checkpoint outputs-" in rest and marked
    assert " of outputs restored, as of " in rest
    assert rest.split("from ")[-1].split()[0] in ("10", "20")
    assert set(recorder.names) == {recorder.names[0]} and recorder.names[0].startswith("outputs-")
    # All of them are in the notebook's folder now, as after any cell.
    assert len(list(Path("outputs").glob("step-*/state.json"))) == 3


def test_not_without_a_checkpoint_nor_against_the_users_will(
    far: Client, whole: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    with pytest.raises(KernelDied, match="SIGKILL"):
        far.run("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    request = far.session.request
    far.session.request = msgspec.structs.replace(request, recover="no")
    try:
        with pytest.raises(MachineLost):
            code = TRAIN.format(name="no", go=str(tmp_path / "go"))
            far.run(code, Killer(tmp_path / "go", lambda: lose_machine(home)))
    finally:
        far.session.request = request
    assert saved(home, "no") == [20, 30, 40]
    # The same cell, by hand: on a new machine it goes on all the same.
    recorder = Recorder()
    far.run(code, recorder).get()
    assert far.namespace["losses"] == whole["losses"]
    assert "Going on from checkpoint no #" in recorder.text


@pytest.mark.parametrize("kill", [lose_machine, lose_kernel])
def test_a_detached_run_goes_on_by_itself(
    kill: Callable[[Path], None], far: Client, whole: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    """With the variables that it was given, whatever has become of them here."""
    go, name = tmp_path / "go", f"away-{kill.__name__}"
    far.namespace["given"] = "as it was"
    handle = far.start(f"print(given)\n{TRAIN.format(name=name, go=str(go))}")
    far.namespace["given"] = "as it is"
    until(lambda: 40 in saved(home, name), "its checkpoint to come here")
    kill(home)
    go.touch()
    until(lambda: 60 in saved(home, name), "its end")
    recorder = Recorder()
    far.session.attach(handle.name, frontend=recorder).get()
    first, _, rest = recorder.text.partition("]\n")
    assert first.startswith("\n[The ") and f"goes on from checkpoint {name} #" in first
    assert "is not kept" in rest.partition("]\n")[0] and "as it was\n" in rest
    assert [int(word) for word in rest.split() if word.isdigit()] == list(range(40, 60))
    assert far.namespace["losses"] == whole["losses"]
    assert (far.namespace["weights"] == whole["weights"]).all()
    assert far.session.runs() == []


def test_a_background_run_goes_on_by_itself(
    far: Client, whole: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    recorder = Killer(tmp_path / "go", lambda: lose_machine(home))
    code = TRAIN.format(name="behind", go=str(tmp_path / "go"))
    handle = far.start(f"{code}total", frontend=recorder)
    assert handle.result(120) == whole["total"]
    before, marked, after = recorder.text.partition("[The ")
    shown = [int(word) for word in before.split()]
    assert shown == list(range(len(shown))) and len(shown) >= 40 and marked
    assert "goes on from checkpoint behind #" in after.partition("]\n")[0]
    assert [int(word) for word in after.split() if word.isdigit()][-20:] == list(range(40, 60))
    assert far.namespace["losses"] == whole["losses"]


def test_a_run_that_is_attached_goes_on(
    far: Client, whole: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    recorder = Killer(tmp_path / "go", lambda: lose_machine(home))
    handle = far.start(TRAIN.format(name="attached", go=str(tmp_path / "go")))
    far.session.attach(handle.run, frontend=recorder).get()
    assert "goes on from checkpoint attached #" in recorder.text
    assert far.namespace["losses"] == whole["losses"]


@pytest.mark.parametrize("waited_for", [True, False])
def test_a_checkpoint_that_is_just_being_written_counts(
    waited_for: bool, far: Client, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there already when the machine is lost, but its writing has not ended."""
    go = tmp_path / "go"
    prune = CheckpointStore._prune

    def lose_all_before(self: CheckpointStore, name: str, keep: Keep) -> list[Manifest]:
        if not go.exists():
            go.touch()
            known = far.session.client
            assert known is not None
            lose_machine(home)
            until(lambda: known.closed is not None, "the loss to be known")
            time.sleep(1)  # for whoever would decide without it
        return prune(self, name, keep)

    far.session._connect()
    monkeypatch.setattr(CheckpointStore, "_prune", lose_all_before)
    code = TRAIN.format(name=f"just-{waited_for}", go=str(go))
    recorder = Recorder()
    if waited_for:
        far.run(code, recorder).get()
    else:
        far.start(code, frontend=recorder).result(60)
    assert f"goes on from checkpoint just-{waited_for} #" in recorder.text
    assert len(far.namespace["losses"]) == 60


def test_a_background_run_that_another_notebook_takes_is_that_ones(tmp_path: Path) -> None:
    go = tmp_path / "go"
    code = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\nx = 6 * 7"
    with client(machine="shared") as first, client(machine="shared") as second:
        handle = first.start(code, frontend=Recorder())
        attached: list[Any] = []
        taker = threading.Thread(
            target=lambda: attached.append(second.session.attach(handle.run, take=True).get())
        )
        taker.start()
        with pytest.raises(RunDetached, match="taken"):
            handle.result(60)
        assert handle.run in [it.run for it in first.session.runs()]
        go.touch()
        taker.join(60)
        assert attached == [None] and second.namespace["x"] == 42
        assert "x" not in first.namespace


def test_a_background_run_beside_a_cell_goes_on_with_it(
    far: Client, whole: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    """On the machine that the cell gets, and not after its end."""
    go, ended = tmp_path / "go", tmp_path / "ended"
    code = TRAIN.format(name="beside", go=str(go))
    handle = far.start(f"{code}open({str(ended)!r}, 'w').close()", new_kernel=True)
    until(lambda: 40 in saved(home, "beside"), "its checkpoint to come here")
    recorder = Killer(go, lambda: lose_machine(home))
    wait = f"while not os.path.exists({str(ended)!r}): time.sleep(0.01)\n"
    far.run(f"{TRAIN.format(name='cell', go=str(go))}{wait}", recorder).get()
    assert far.namespace["losses"] == whole["losses"]
    handle.result(60)
    assert far.namespace["losses"] == whole["losses"]


def test_jobs_that_cannot_go_on_cost_nothing_more(far: Client, home: Path, tmp_path: Path) -> None:
    """Without a checkpoint they end with the reason, and no machine is started for that."""
    endless = f"import time\nopen({str(tmp_path / 'begun')!r}, 'w').close()\ntime.sleep(3600)"
    detached = far.start(endless)
    behind = far.start("1", frontend=Recorder())
    until((tmp_path / "begun").exists, "its beginning")
    lose_machine(home)
    for handle in (detached, behind):
        with pytest.raises(MachineLost):
            handle.result(60)
    ledger = Ledger.open()
    alive = portal().call(lifecycle.settle(ledger))
    assert [it.name for it in alive if it.name == far.session._name] == []
    ledger.close()


def test_who_stops_the_machine_of_a_job_gets_no_other_one(
    far: Client, home: Path, tmp_path: Path
) -> None:
    code = TRAIN.format(name="halted", go=str(tmp_path / "never"))
    handle = far.start(code, frontend=Recorder())
    until(lambda: 40 in saved(home, "halted"), "its checkpoint to come here")
    far.session.stop()
    with pytest.raises(MlinfraError):
        handle.result(60)
    assert not processes(home)


def test_a_detached_run_whose_client_has_gone_begins_at_once(
    far: Client, home: Path, tmp_path: Path
) -> None:
    """It asks nobody for checkpoints."""
    go = tmp_path / "go"
    wait = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)"
    first = Client(Request(env="none", isolate=True, machine="orphan"))
    first.start(wait)
    first.start(TRAIN.format(name="orphan", go=str(go)))
    first.session.close()
    go.touch()
    with client(isolate=True, machine="orphan") as it:
        until(
            lambda: [run.status for run in it.session.runs()] == ["done"] * 2,
            "their end",
            lambda: it.session.runs(),
        )
        assert saved(home, "orphan") == []
        for run in it.session.runs():
            it.session.attach(run.run).get()
        assert saved(home, "orphan")[-1] == 60
        it.session.stop()


def test_what_is_always_begun_again_gives_up(far: Client, tmp_path: Path) -> None:
    request = far.session.request
    far.session.request = msgspec.structs.replace(request, recover="always")
    count = tmp_path / "count"
    code = f"open({str(count)!r}, 'a').write('x')\nimport os, signal\n"
    try:
        far.run(
            f"{code}os.path.getsize({str(count)!r}) > 1 or os.kill(os.getpid(), signal.SIGKILL)"
        ).get()
        with pytest.raises(KernelDied):
            far.run(f"{code}os.kill(os.getpid(), signal.SIGKILL)")
    finally:
        far.session.request = request
    assert len(count.read_text()) == 2 + 4


def test_attempts_share_the_budget_of_their_run(home: Path) -> None:
    """At a dollar a second: alone, each attempt would end before its two dollars are spent."""
    paid: dict[str, Any] = {"price": 3600_000_000, "budget": 2_000_000, "confirm": None}
    code = "import os, signal, time\ntime.sleep(1.5)\nos.kill(os.getpid(), signal.SIGKILL)"
    spent = pytest.raises(BudgetSpent, match=r"budget=\$2.00")
    with client(isolate=True, recover="always", **paid) as it, spent:
        it.run(code).get()


def test_the_end_of_the_machine_is_noticed(home: Path, tmp_path: Path) -> None:
    """A fifth of its time before the end, a checkpoint is made that no rule asked for."""
    code = (
        "import time, mlinfra_sdk\nstate = dict(n=0)\n"
        "for step in mlinfra_sdk.checkpoint('end').loop(range(10**6), state=state, every='1h'):\n"
        "    state['n'] += 1\n    time.sleep(0.01)\n"
    )
    recorder = Recorder()
    with client(isolate=True, time=6.0) as it, pytest.raises((MachineLost, KernelDied)):
        it.run(code, recorder)
    assert "A checkpoint has been saved at step" in recorder.text
    assert recorder.steps and saved(home, "end") == recorder.steps


def test_the_command_lists_exports_and_removes(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch = pytest.importorskip("torch")
    state = {"net": torch.nn.Linear(2, 2), "x": np.arange(3), "n": {"a": 1}}
    ckpt = mlinfra_sdk.checkpoint("export")
    for step in (1, 2, 3):
        ckpt.save(state, step=step, wait=True, loss=1 / step)

    def mlinfra(*words: str) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main(list(words))
        printed = capsys.readouterr()
        return printed.out if not end.value.code else printed.err

    rows = json.loads(mlinfra("checkpoints", "export", "--json"))
    assert [(row["step"], row["metrics"]["loss"]) for row in rows] == [(1, 1), (2, 0.5), (3, 1 / 3)]
    assert "export" in mlinfra("checkpoints") and "loss 0.5" in mlinfra("checkpoints", "export")
    folder = tmp_path / "plain"
    mlinfra("checkpoints", "export", "--number", "2", "--export", str(folder))
    assert sorted(it.name for it in folder.iterdir()) == [
        "checkpoint.json",
        "n.pkl",
        "net.pt",
        "x.npy",
    ]
    assert torch.load(folder / "net.pt")["weight"].equal(state["net"].weight)
    assert np.load(folder / "x.npy").tolist() == [0, 1, 2]
    assert "is not empty" in mlinfra("checkpoints", "export", "--export", str(folder))
    assert "2 checkpoints" in mlinfra("checkpoints", "export", "--keep", "1")
    mlinfra("checkpoints", "export", "--remove")
    assert "Did you mean" in mlinfra("checkpoints", "exprt") or "no checkpoints of" in mlinfra(
        "checkpoints", "export"
    )


def test_a_mirror(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which only new chunks travel; another home goes on from it."""

    def steps(cut: int) -> list[int]:
        keep = mlinfra_sdk.Keep(last=3)
        ckpt = mlinfra_sdk.checkpoint("mirrored", to=f"file://{tmp_path}/run", keep=keep)
        state = {"frozen": np.arange(300_000), "w": np.zeros(100_000), "n": 0}
        done = []
        for step in ckpt.loop(range(4), state=state, every=1):
            if step == cut:
                break
            state["w"] += 1
            state["n"] += 1
            done.append(step)
            ckpt.wait()
        assert state["n"] == cut and (state["w"] == state["n"]).all()
        return done

    assert steps(3) == [0, 1, 2]
    root = tmp_path / "run" / "mirrored"
    manifests = sorted(root.glob("*.ckpt"))
    assert [it.name[:8] for it in manifests] == ["00000001", "00000002", "00000003"]
    assert len(list((root / "chunks").iterdir())) == 1 + 3, "the frozen one, and one for each"
    monkeypatch.setenv("MLINFRA_HOME", str(home.parent / "other"))
    manifests[-1].write_bytes(manifests[-1].read_bytes()[:-1] + b"x")
    assert steps(4) == [2, 3]
