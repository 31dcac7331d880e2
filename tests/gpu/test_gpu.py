"""What only a real GPU can show, on one of NVIDIA's: `pytest tests/gpu`."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pynvml
import pytest
import torch
from faulty import Recorder

import mlinfra_sdk
from mlinfra_sdk import Session
from mlinfra_sdk.catalog import catalog
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.running import Result
from mlinfra_sdk.worker import gpus

BUSY = """
import time, torch, mlinfra_sdk
a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
end = time.monotonic() + 6
for step in mlinfra_sdk.track(iter(lambda: time.monotonic() < end, False), samples=8192):
    for _ in range(20):
        b = a @ a
    torch.cuda.synchronize()
"""
STARVED = """
import time, torch
a = torch.randn(1024, 1024, device="cuda")
end = time.monotonic() + 5
while time.monotonic() < end:
    sum(range(2_000_000))
    b = a @ a
"""


def run(session: Session, code: str, recorder: Recorder | None = None) -> Result:
    names = cell_names(code, session.namespace, code)
    return session.execute(code, names, frontend=recorder or Recorder(), count=1)


def test_the_gpu_is_known() -> None:
    (device,) = gpus.present()
    name = catalog().label(device)
    assert name in catalog().parts, f"{device} is not in the catalog"
    assert device.name == torch.cuda.get_device_name(0)
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert asked == f"{device.name}, {device.memory >> 20}"


def test_the_gpu_that_was_asked_for_is_checked() -> None:
    (device,) = gpus.present()
    name = catalog().label(device).split("-")[0]
    for wish in (name, "any", "24GB", f"T4|{name}", "none"):
        with Session(namespace={}, gpu=wish) as session:
            assert session.run("import torch; torch.cuda.is_available()") is True
    for wish in ("T4", f"{name}:2", "500GB", "V100|L4"):
        session = Session(namespace={}, on="local", gpu=wish)
        with session, pytest.raises(RequestError) as raised:
            session.run("1")
        assert catalog().label(device) in str(raised.value)


def test_tensors_keep_their_bits_device_and_sharing() -> None:
    base = torch.randn(1 << 20, device="cuda")
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.BatchNorm1d(256)).cuda()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(32, 256, device="cuda")).square().mean().backward()
    optimizer.step()
    half = base[: 1 << 19].to(torch.bfloat16)
    namespace: dict[str, object] = {
        "base": base, "view": base[::2], "model": model, "optimizer": optimizer, "half": half,
    }  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grad = next(model.parameters()).grad
    assert grad is not None
    with Session(namespace=namespace, gpu="any") as session:
        found = session.run(
            "[view.device.type, half.dtype == __import__('torch').bfloat16,"
            " view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr(),"
            " {p.device.type for p in model.parameters()}, float(base.double().sum())]"
        )
        assert found == ["cuda", True, True, {"cuda"}, float(base.double().sum())]
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        session.run("view.fill_(7); half.mul_(2)")
        assert namespace["base"] is base and base.is_cuda
        assert bool((base[::2] == 7).all()) and not bool((base[1::2] == 7).all())
        session.run(
            "import torch\n"
            "for _ in range(3):\n"
            "    optimizer.zero_grad()\n"
            "    model(torch.randn(32, 256, device='cuda')).sum().backward()\n"
            "    optimizer.step()\n"
            "made = torch.arange(10, device='cuda')"
        )
    assert next(model.parameters()).is_cuda
    assert not torch.equal(next(model.parameters()), before["0.weight"])
    state = optimizer.state[next(model.parameters())]
    assert float(state["step"]) == 4 and state["exp_avg"].is_cuda
    made = namespace["made"]
    assert isinstance(made, torch.Tensor) and made.is_cuda and made.tolist() == list(range(10))


def test_a_changed_part_is_stored_once(home: Path) -> None:
    big = torch.randn(64 << 20, device="cuda")  # 256 MiB
    namespace: dict[str, object] = {"big": big}

    def stored() -> int:
        return sum(it.stat().st_size for it in (home / "store").rglob("*") if it.is_file())

    with Session(namespace=namespace, gpu="any") as session:
        for bound in (257 << 20, 1 << 16, 6 << 20):
            before = stored()
            session.run("total = float(big.double().sum())")
            assert namespace["total"] == float(big.double().sum())
            assert stored() - before < bound
            if bound == 1 << 16:
                big[: 64 << 13] += 1


def test_a_client_without_a_gpu(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, torch
            import mlinfra_sdk
            assert not torch.cuda.is_available()  # for good: the driver looks once
            with mlinfra_sdk.Session() as session:
                # The machine is a child of this process; it shall have the GPU.
                session.run("import os; os.environ.pop('CUDA_VISIBLE_DEVICES'); import torch")
                session.run("model = torch.nn.Linear(4, 4).cuda(); x = torch.ones(4).cuda()")
                print(x.device, next(model.parameters()).device, x.tolist())
                x += 1
                session.run("found = [x.device.type, next(model.parameters()).device.type]")
                print(found, session.run("x.tolist()"), x.device)
            """
        )
    )
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "cpu cpu [1.0, 1.0, 1.0, 1.0]",
        "['cuda', 'cuda'] [2.0, 2.0, 2.0, 2.0] cpu",
    ]


def test_what_it_does_is_measured() -> None:
    with Session(namespace={}, gpu="any") as session:
        session.run("import torch; torch.ones(1, device='cuda'); None")
        usage = run(session, BUSY).usage
        assert usage is not None
        assert usage.gpu == torch.cuda.get_device_name(0)
        assert usage.gpu_busy is not None and usage.gpu_busy > 80 and usage.bound.startswith("GPU")
        assert usage.joules is not None and usage.joules > 100 * usage.seconds  # idle: 70 W
        assert usage.gpu_memory_peak > 256 << 20
        (loop,) = usage.loops
        assert loop.unit == "samples" and loop.rate > 0
        starved = run(session, STARVED).usage
        assert starved is not None and starved.gpu_busy is not None and starved.gpu_busy < 60
        assert starved.bound.startswith("input"), (starved.bound, starved.evidence)
        print(usage, starved)
    ledger = Ledger.open()
    kept = {it.name for it in ledger.measurements()}
    ledger.close()
    assert {"gpu_energy", "rate:samples"} <= kept


def test_a_seed_set_here_is_that_of_the_gpu_there() -> None:
    draw = "torch.randn(3, device='cuda').tolist()"
    with Session(namespace={"torch": torch}, gpu="any") as session:
        for seed in (5, 6, 5):
            torch.manual_seed(seed)
            wanted = torch.randn(3, device="cuda").tolist()
            torch.manual_seed(seed)
            torch.rand(1)  # the processor's generator goes on, which is another one
            assert session.run(draw) == wanted
        assert session.run(draw) != wanted


def test_errors_of_the_gpu_come_here_and_the_kernel_goes_on() -> None:
    with Session(namespace={}, gpu="any") as session:
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            session.run("import torch\nx = torch.empty(1 << 40, device='cuda')")
        assert session.run("torch.ones(2, device='cuda').sum().item()") == 2
        with pytest.raises(RuntimeError, match="device-side assert"):
            session.run("torch.zeros(2, device='cuda')[torch.tensor([7], device='cuda')].item()")
        session.restart()  # CUDA is of no use in a process after that
        assert session.run("import torch; torch.ones(2, device='cuda').sum().item()") == 2


def test_a_restart_gives_the_memory_back() -> None:
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)

    def used() -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) >> 20

    with Session(namespace={}, gpu="any") as session:
        before = used()
        session.run(
            "import torch; x = torch.empty(4 << 30, dtype=torch.uint8, device='cuda'); None"
        )
        assert used() > before + 4000
        session.restart()
        deadline = time.monotonic() + 30
        while used() > before + 1000 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert used() < before + 1000


def test_an_interrupt_ends_work_on_the_gpu() -> None:
    with Session(namespace={}, gpu="any") as session:
        session.run("import torch; a = torch.randn(4096, 4096, device='cuda')")
        timer = threading.Timer(3, session.interrupt)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            session.run("while True:\n    b = a @ a\n    torch.cuda.synchronize()")
        assert session.run("a.device.type") == "cuda"


TRAIN = """
import os, sys
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
import torch
import mlinfra_sdk

torch.use_deterministic_algorithms(True)
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(),
    torch.nn.Dropout(0.3), torch.nn.Linear(8 * 26 * 26, 10),
).cuda()
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
scaler = torch.amp.GradScaler("cuda")
losses = []
state = dict(model=model, optimizer=optimizer, scaler=scaler, losses=losses, rng="all")
for step in mlinfra_sdk.checkpoint("gpu").loop(range(60), state=state, every=7):
    if step == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    x = torch.randn(64, 1, 28, 28, device="cuda")
    y = torch.randint(10, (64,), device="cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        loss = torch.nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    losses.append(loss.item())
torch.save([losses, {k: v.cpu() for k, v in model.state_dict().items()}], sys.argv[1])
"""


def test_training_on_the_gpu_goes_on_bitwise(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)

    def train(home: str, out: str, kill: int) -> int:
        env = {**os.environ, "MLINFRA_HOME": str(tmp_path / home)}
        command = [sys.executable, str(script), str(tmp_path / out), str(kill)]
        return subprocess.run(command, env=env, timeout=120).returncode

    assert train("whole", "whole.pt", -1) == 0
    assert train("killed", "killed.pt", 23) == -9
    assert train("killed", "killed.pt", 45) == -9
    assert train("killed", "killed.pt", -1) == 0
    (whole, weights), (killed, same) = (
        torch.load(tmp_path / name) for name in ("whole.pt", "killed.pt")
    )
    assert len(whole) == 60 and killed == whole
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_a_save_copies_on_the_gpu_and_frees_it() -> None:
    state = {"weights": torch.ones(64 << 20, device="cuda")}
    before = torch.cuda.memory_allocated()
    ckpt = mlinfra_sdk.checkpoint("copies")
    with torch.cuda.stream(torch.cuda.Stream()):
        state["weights"].add_(1)
        ckpt.save(state)
        state["weights"].zero_()
    ckpt.wait()
    assert torch.cuda.memory_allocated() == before
    ckpt.restore(state)
    assert (state["weights"] == 2).all()
