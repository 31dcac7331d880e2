"""What a run does to its machine is measured there, shown live, and kept in the ledger.

The GPU is a recorded one behind the real interface of NVIDIA's library (``nvml.c``).
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest
from clouds import A10G, GPUS

from mlinfra_sdk import Session
from mlinfra_sdk.frontend import Console
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.worker.records import METRICS, Record
from mlinfra_sdk.worker.run_usage import Reading

CODE = """
import time
from tqdm import tqdm
import mlinfra_sdk
held = bytearray(b"x" * (150 << 20))
end = time.monotonic() + 4.5
steps = iter(lambda: time.monotonic() < end, False)
for step in tqdm(mlinfra_sdk.track(steps, samples=8, label="steps"), desc="bar"):
    sum(range(20000))
"""


class Listening(Console):
    """Also keeps the readings."""

    def __init__(self) -> None:
        super().__init__()
        self.readings: list[Reading] = []

    def publish(self, record: Record) -> None:
        if record.msg_type == METRICS:
            self.readings.append(msgspec.json.decode(record.content, type=Reading))
        else:
            super().publish(record)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Path(__file__).parent / "nvml.c"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", tmp_path / "libnvidia-ml.so.1", library], check=True
    )
    (tmp_path / "load").write_text("90 0")
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv(GPUS, A10G)
    monkeypatch.setenv("RECORDED_LOAD", str(tmp_path / "load"))
    monkeypatch.setenv("RECORDED_STATE", "75 2048 150000 61")


@pytest.mark.usefixtures("gpu")
def test_a_run_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    frontend = Listening()
    with Session(namespace={}) as session:
        names = cell_names(CODE, {}, CODE)
        result = session.execute(CODE, names, frontend=frontend, count=1)
        assert result.error is None
        quick = session.execute("1", cell_names("1", {}, "1"), frontend=frontend, count=2)
    last = frontend.readings[-1]
    (gpu,) = last.gpus
    assert (gpu.busy, gpu.memory_busy, gpu.watts, gpu.celsius) == (90, 75, 150, 61)
    assert gpu.used == 2048 << 20 and gpu.total > gpu.used
    assert last.memory > 150 << 20 and last.cores > 0
    assert {meter.source for meter in last.meters} == {"tqdm", "track"}
    usage = result.usage
    assert usage is not None and usage.readings == len(frontend.readings)
    assert (
        usage.bound == "GPU memory"
        and usage.evidence == "GPU busy 90 % of the time, its memory 75 %"
    )
    assert usage.joules == pytest.approx(150 * usage.seconds, rel=0.01)
    loops = {loop.label: loop for loop in usage.loops}
    assert loops["steps"].unit == "samples" and loops["steps"].done == 8 * loops["bar"].done
    assert loops["steps"].rate == pytest.approx(8 * loops["bar"].rate, rel=0.2)
    assert quick.usage is None  # nothing is measured, and it costs nothing
    ledger = Ledger.open()
    kept = {it.name: it.value for it in ledger.measurements()}
    ledger.close()
    assert kept["rate:samples"] == loops["steps"].rate and kept["gpu_energy"] == usage.joules
    assert "bar" in capsys.readouterr().err
