"""``on=slurm`` with a real Slurm of one node: jobs, their ends, and what they were asked for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import pytest
from faulty import Recorder
from live import until
from slurm_cluster import Cluster, missing, slurm
from sshd import running
from test_conformance import without_folder_for_machines

from mlinfra_sdk.catalog.gpus import parse_gpus
from mlinfra_sdk.errors import BudgetSpent, MachineLost, ProviderError, RequestError
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines import lifecycle
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.machines.sweep import sweep
from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.paths import data_dir
from mlinfra_sdk.providers.slurm import Options, SlurmProvider, _seconds
from mlinfra_sdk.providers.waiting import listening
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request
from mlinfra_sdk.testing import ProviderSuite

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"not installed: {', '.join(missing())}")


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, prepared: Callable[[Path], None]
) -> Iterator[Cluster]:
    """The cluster, and a state directory."""
    with pytest.MonkeyPatch.context() as patch, slurm() as it:
        home = tmp_path_factory.mktemp("slurm")
        prepared(home)
        patch.setenv("MLINFRA_HOME", str(home))
        for name, value in it.env.items():
            patch.setenv(name, value)
        yield it
        assert jobs(it) == []


class TestSlurm(ProviderSuite):
    on = "slurm"

    @pytest.fixture(autouse=True)
    @staticmethod
    def _cluster(cluster: Cluster) -> None:
        pass

    @contextmanager
    def broken(self) -> Iterator[None]:
        with without_folder_for_machines(data_dir() / "host"):
            yield

    def test_a_launch_that_is_cancelled_while_it_submits_leaves_nothing(
        self, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        slow, submitted = tmp_path / "sbatch", tmp_path / "submitted"
        slow.write_text(
            f'#!/bin/sh\n{shutil.which("sbatch")} "$@" || exit\n'
            f'case "$*" in *--test-only*) ;; *) : >{submitted}; sleep 1 ;; esac\n'
        )
        slow.chmod(0o700)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

        async def cancelled() -> None:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.launched, "cancelled")
                while not submitted.exists():
                    await anyio.sleep(0.01)
                tasks.cancel_scope.cancel()

        portal().call(cancelled())
        assert submitted.exists() and jobs(cluster) == []


def jobs(cluster: Cluster, form: str = "%i") -> list[str]:
    return cluster.command("squeue", "--noheader", f"--format={form}").split()


def session(**settings: object) -> Session:
    settings = {"on": "slurm", "env": "none", "sync": False} | settings
    return Session(namespace={}, request=Request(**settings))


def test_a_cluster_that_was_used_is_swept(cluster: Cluster) -> None:
    with session(time=600.0) as it:
        it.run("1")
        assert it.machine is not None
        it.ledger.machine_stopped(it.machine.id, reason="the network was gone")
        (found,) = portal().call(sweep(it.ledger)).findings
        assert (found.target, found.stopped) == ("slurm", True)
        assert jobs(cluster) == []


def test_a_job_runs_cells_and_ends_with_its_session(cluster: Cluster) -> None:
    with session(time=600.0) as it:
        it.push(x=[1])
        it.run("import os; x.append(2); job = os.environ['SLURM_JOB_ID']")
        assert it.namespace["x"] == [1, 2]
        # By this the agent tells the limit's signal from that of a preemption.
        it.run("import time; left = int(os.environ['SLURM_JOB_END_TIME']) - time.time()")
        assert 0 < it.namespace["left"] <= 601
        assert jobs(cluster, "%i|%j|%T|%l") == [f"{it.namespace['job']}|mlinfra|RUNNING|10:00"]
        machine = it.machine
        assert machine is not None
        assert jobs(cluster, "%k") == [machine.id]
    assert jobs(cluster) == []


def test_the_budget_of_a_machine_shortens_its_job(cluster: Cluster) -> None:
    # 0.35 USD at 1 USD an hour are 21 minutes; Slurm counts whole ones.
    with session(time=36_000.0, price=1_000_000, machine_budget=350_000) as it:
        it.run("1")
        assert jobs(cluster, "%l") == ["21:00"]


def test_a_run_ends_with_its_budget(cluster: Cluster) -> None:
    with session(price=3_600_000, budget=1500) as it:  # 1.5 s
        with pytest.raises(BudgetSpent, match=r"budget=\$0.0015"):
            it.run("import time\nx = 1\nwhile True: time.sleep(0.01)")
        assert it.run("2") == 2  # the machine goes on


def test_it_ends_by_itself_when_nobody_uses_it(cluster: Cluster) -> None:
    it = session(machine="lonely", idle=1.0)
    it.run("x = 1")
    it.close()
    until(lambda: not jobs(cluster), "the job to end")
    ledger = Ledger.open()
    portal().call(lifecycle.settle(ledger))
    machine = next(it for it in ledger.machines(active=False) if it.name == "lonely")
    assert machine.stop_reason == "idle for 1 s"
    ledger.close()


def lost(it: Session, end: object) -> MachineLost:
    """What a run says whose job is ended while it goes on."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            it.run("print('on', flush=True)\nimport time\nwhile True: time.sleep(0.1)")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    until(lambda: (info := it.agent()) is not None and info.busy, "the run to begin")
    end()  # type: ignore[operator]
    thread.join(90)
    assert not thread.is_alive(), "it hangs"
    (error,) = errors
    assert isinstance(error, MachineLost), error
    return error


def test_a_job_that_is_cancelled_loses_the_machine_and_the_next_run_gets_another(
    cluster: Cluster,
) -> None:
    with session() as it:
        it.push(kept=41)
        (job,) = jobs(cluster)
        error = lost(it, lambda: cluster.command("scancel", "--signal=KILL", "--full", job))
        assert "has ended" in error.message
        assert it.run("kept + 1") == 42
        (other,) = jobs(cluster)
        assert other != job
        it.stop()


def test_its_time_limit_is_a_hard_stop(cluster: Cluster) -> None:
    with session(time=3600.0) as it:
        it.run("1")
        (job,) = jobs(cluster)
        assert jobs(cluster, "%l") == ["1:00:00"]
        lost(it, lambda: cluster.command("scontrol", "update", f"JobId={job}", "EndTime=now+1"))
        it.stop()
        assert jobs(cluster) == []


def test_gpus_are_those_of_the_cluster(cluster: Cluster) -> None:
    provider = SlurmProvider()

    def offered(gpu: str) -> list[str]:
        request = Request(on="slurm", gpu=parse_gpus(gpu))
        return [str(offer.gpu) for offer in portal().call(provider.offers(request))]

    assert offered("A10:2") == ["A10:2"]
    assert offered("H100|A10") == ["A10"]
    with pytest.raises(RequestError, match=r"gpu=H100 cannot be met by on=slurm.*A10:2"):
        offered("H100")
    with pytest.raises(RequestError, match="A10:2"):
        offered("A10:3")


def test_a_gpu_that_is_not_there_in_fact_is_refused_and_nothing_is_left(cluster: Cluster) -> None:
    """This Slurm only says that it has some."""
    with pytest.raises(RequestError, match=r"gpu=A10 cannot be met .* no NVIDIA GPU"):
        session(gpu=parse_gpus("A10")).run("1")
    assert jobs(cluster) == []


def test_a_launch_tells_its_place_in_the_queue_and_can_be_given_up(cluster: Cluster) -> None:
    others = [
        cluster.command("sbatch", "--parsable", "--output=/dev/null", *words).strip()
        for words in (
            ("--gres=gpu:a10:2", "--time=10", "--wrap=sleep 300"),
            ("--gres=gpu:a10:2", "--time=5", "--wrap=true"),
        )
    ]
    until(lambda: f"{others[0]}|RUNNING" in jobs(cluster, "%i|%T"), "the other job")
    provider = SlurmProvider()
    request = Request(on="slurm", gpu=parse_gpus("A10"))
    (offer,) = portal().call(provider.offers(request))
    assert offer.start_seconds > 5
    told: list[str] = []
    with listening(told.append):
        launch = portal().submit(provider.launch(offer, request, "abc"))
    place = re.compile(r"queued at Slurm, position 2 of 2 \(\w+\)(; Slurm expects .* 1\d min.*)?")
    until(lambda: any(map(place.fullmatch, told)), "the place", lambda: str(told))
    launch.cancel()
    until(lambda: set(jobs(cluster)) == set(others), "our job to go", lambda: jobs(cluster))
    cluster.command("scancel", *others)
    until(lambda: not jobs(cluster), "the other jobs to go")


def test_a_job_that_is_preempted_is_a_lost_machine_and_does_not_come_back(
    cluster: Cluster, tmp_path: Path
) -> None:
    """One of higher priority takes the whole node."""
    with session() as it:
        it.push(kept=41)
        (job,) = jobs(cluster)
        urgent = ["sbatch", "--parsable", "--partition=urgent", "--exclusive", "--wrap=sleep 60"]
        other = ""

        def preempt() -> None:
            nonlocal other
            other = cluster.command(*urgent, "--output=/dev/null").strip()

        try:
            error = lost(it, preempt)
            assert "Slurm gave its node to a job of higher priority" in error.message
            # Its processes may take a moment to end; a job that waits again never goes.
            until(lambda: job not in jobs(cluster), "the job to go", lambda: jobs(cluster, "%i|%T"))
        finally:
            cluster.command("scancel", other)
        it.stop()
    until(lambda: not jobs(cluster), "the jobs to go")


def test_a_job_that_is_preempted_saves_itself_and_its_cell_goes_on(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Nothing but Slurm's notice makes the first job save it."""
    jobs_of_it = tmp_path / "jobs"
    code = f"""
import os, time, mlinfra_sdk
from pathlib import Path
with open({str(jobs_of_it)!r}, "a") as log:
    log.write(os.environ["SLURM_JOB_ID"] + "\\n")
first = len(Path({str(jobs_of_it)!r}).read_text().split()) == 1
state = dict(n=0)
for step in mlinfra_sdk.checkpoint("slurm").loop(range(10**6), state=state, every="1h"):
    if not first and step > 0:
        break
    state["n"] += 1
    time.sleep(0.01)
n = state["n"]
"""
    recorder = Recorder()
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--exclusive", "--wrap=sleep 3"]
    with session() as it:
        it.run("1")
        (job,) = jobs(cluster)

        def preempt() -> None:
            until(jobs_of_it.exists, "the run to begin")
            cluster.command(*urgent, "--output=/dev/null")

        thread = threading.Thread(target=preempt)
        thread.start()
        it.execute(code, cell_names(code, {}, code), frontend=recorder, count=1).get()
        thread.join()
        assert it.namespace["n"] == recorder.steps[0] > 0
        it.stop()
    both = jobs_of_it.read_text().split()
    assert both[0] == job and len(set(both)) == 2
    assert "Slurm takes its node back" in recorder.text
    assert "Slurm gave its node to a job of higher priority" in recorder.text
    until(lambda: not jobs(cluster), "the jobs to go")


def test_what_slurm_refuses_is_explained(cluster: Cluster) -> None:
    provider = SlurmProvider(Options(partition="nowhere"))
    with pytest.raises(ProviderError, match=r"did not take the job.*invalid partition"):
        portal().call(launched(provider))
    assert jobs(cluster) == []


async def launched(provider: SlurmProvider) -> object:
    request = Request(on="slurm")
    (offer,) = await provider.offers(request)
    return await provider.launch(offer, request, "refused")


def test_the_client_is_killed_and_another_process_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    code = """
import os, signal
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request
it = Session(namespace={}, request=Request(on="slurm", machine="shared", sync=False, env="none"))
it.run("there = 6 * 7")
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False)
    assert done.returncode == -9
    (job,) = jobs(cluster)
    it = session(machine="shared")
    assert it.run("1 + 1") == 2
    assert jobs(cluster) == [job]
    it.stop()
    assert jobs(cluster) == []


def test_a_cluster_behind_ssh(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's commands are those of the login node; here there is only ssh."""
    home = os.environ["MLINFRA_HOME"]
    with running(tmp_path / "login", MLINFRA_HOME=home, **cluster.env) as login, login.known():
        monkeypatch.delenv("SLURM_CONF")
        with session(on="slurm:box") as it:
            it.push(x=[1])
            it.run("import os; x.append(2); job = os.environ['SLURM_JOB_ID']")
            assert it.namespace["x"] == [1, 2]
            assert jobs(cluster) == [it.namespace["job"]]
        assert jobs(cluster) == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30:00", 1800.0), ("1-12:00:00", 129600.0), ("2:00:00", 7200.0), ("infinite", float("inf"))],
)
def test_time_limits(text: str, seconds: float) -> None:
    assert _seconds(text) == seconds
