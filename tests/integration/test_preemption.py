"""Machines that are taken away with a notice: what runs saves itself, and goes on elsewhere."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from emulators.metadata import Metadata, metadata
from faulty import Recorder
from live import until
from sshd import Sshd, running

from mlinfra_sdk.errors import MachineLost
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines import lifecycle
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.session import Session

pytestmark = pytest.mark.timeout(300)

TRAIN = """
import os, time, mlinfra_sdk
from pathlib import Path
with open({log!r}, "a") as log:
    log.write(f"{{os.getppid()}}\\n")
agents = Path({log!r}).read_text().split()
state, first = dict(n=0), None
for step in mlinfra_sdk.checkpoint({name!r}).loop(range(10**6), state=state, every="1h"):
    first = step if first is None else first
    state["n"] += 1
    if len(agents) > 1 and step > first + 5:
        break
    time.sleep(0.01)
n = state["n"]
"""
"""Nothing but a notice makes its first machine save it; it ends on the second one."""


class Trainer(Recorder):
    """Calls ``safe_now`` when a checkpoint is safe."""

    def __init__(self, safe_now: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._safe_now = safe_now

    def safe(self, name: str, step: int, at: float) -> None:
        super().safe(name, step, at)
        self._safe_now()


@pytest.fixture(scope="module")
def cloud() -> Iterator[Metadata]:
    with metadata() as it:
        yield it


@pytest.fixture(scope="module")
def box(
    warm_box: Sshd, cloud: Metadata, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sshd]:
    """A spot machine of AWS, as far as it can tell."""
    folder = tmp_path_factory.mktemp("spot")
    (folder / "home").symlink_to(warm_box.home)
    with (
        running(folder, AWS_EC2_METADATA_SERVICE_ENDPOINT=cloud.address) as it,
        it.known(),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("MLINFRA_HOME", str(folder / "state"))
        yield it


def execute(session: Session, code: str, recorder: Recorder) -> None:
    session.execute(code, cell_names(code, {}, code), frontend=recorder, count=1).get()


@contextmanager
def after(true: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Do something when something is true, while the block goes on."""

    def wait() -> None:
        until(true, "the run to begin")
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def agents(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def test_a_spot_machine_is_taken_back(box: Sshd, cloud: Metadata, tmp_path: Path) -> None:
    log = tmp_path / "agents"
    recorder = Trainer(cloud.keep)
    with Session(namespace={}, on="ssh:box", sync=False, env="none") as session:
        with after(lambda: bool(agents(log)), lambda: cloud.take_back(6)):
            execute(session, TRAIN.format(log=str(log), name="spot"), recorder)
        n = session.namespace["n"]
    assert len(set(agents(log))) == 2
    assert "A checkpoint has been saved at step" in recorder.text
    assert "AWS takes back its spot machine. The cell begins again" in recorder.text
    assert f"(step {recorder.steps[0]})" in recorder.text
    assert n == recorder.steps[0] + 7
    ledger = Ledger.open()
    portal().call(lifecycle.settle(ledger))
    reasons = {it.stop_reason for it in ledger.machines(active=False)}
    ledger.close()
    assert "AWS takes back its spot machine" in reasons


def test_a_host_that_shuts_down_says_so_by_a_signal(box: Sshd, tmp_path: Path) -> None:
    """The agent goes on until nothing runs any more, but for 25 seconds at most."""
    log = tmp_path / "agents"
    recorder = Trainer(lambda: kill(agents(log)[0]))
    with Session(namespace={}, on="ssh:box", sync=False, env="none") as session:
        with after(lambda: bool(agents(log)), lambda: os.kill(agents(log)[0], signal.SIGTERM)):
            execute(session, TRAIN.format(log=str(log), name="signalled"), recorder)
        assert session.namespace["n"] == recorder.steps[0] + 7
    assert len(set(agents(log))) == 2


def kill(agent: int) -> None:
    """At once with its kernels, as a host that is switched off."""
    with suppress(psutil.NoSuchProcess):
        it = psutil.Process(agent)
        for process in [it, *it.children(recursive=True)]:
            process.kill()


def test_what_cannot_go_on_ends_with_the_reason(box: Sshd, cloud: Metadata, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    code = f"import time\nopen({str(begun)!r}, 'w').close()\nwhile True: time.sleep(0.01)"
    with Session(namespace={}, on="ssh:box", sync=False, env="none") as session:
        lost = pytest.raises(MachineLost, match="AWS takes back its spot machine")
        with after(begun.exists, lambda: cloud.take_back(3)), lost:
            execute(session, code, Recorder())
        cloud.keep()
        assert session.run("1 + 1") == 2
