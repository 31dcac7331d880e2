"""``on=sky`` with the real SkyPilot: its optimizer, its server, and launches in a real Slurm.

What it sets up on a machine comes from the internet, so here every launch fails at that; what is
looked at is what it chose, what it submitted, and that nothing is left. How machines end is tried
with the job that SkyPilot would run, as a job of that Slurm.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path

import pytest
import skypilot
import slurm_cluster
from live import until
from msgspec.structs import replace
from skypilot import jobs
from slurm_cluster import Cluster
from sshd import running

from mlinfra_sdk.catalog.gpus import Gpu, parse_gpus
from mlinfra_sdk.errors import NoCapacity, ProviderError, RequestError
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines import lifecycle, market
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.providers import tools
from mlinfra_sdk.providers.base import Handle, Offer
from mlinfra_sdk.providers.sky import Options, SkyProvider
from mlinfra_sdk.providers.sky.engine import TOOL
from mlinfra_sdk.providers.sky.names import names_for
from mlinfra_sdk.providers.sky.provider import PREFIX
from mlinfra_sdk.providers.waiting import listening
from mlinfra_sdk.spec import Request
from mlinfra_sdk.worker.watchdog import Limits

_MISSING = [*slurm_cluster.missing(), *skypilot.missing()]
pytestmark = [
    pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {', '.join(_MISSING)}"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster behind the clouds of SkyPilot."""
    folder = tmp_path_factory.mktemp("sky")
    with (
        slurm_cluster.slurm() as it,
        running(folder / "login", **it.env) as login,
        skypilot.home(folder / "home", login),
    ):
        yield it
        assert jobs(it) == []


def provider(infra: str = "") -> SkyProvider:
    return SkyProvider(Options(infra=infra, cpus="1"))


def offers(of: SkyProvider, gpu: str = "none") -> list[Offer]:
    return portal().call(of.offers(Request(on="sky", gpu=parse_gpus(gpu))))


def clusters() -> list[str]:
    return [handle.key for handle in portal().call(SkyProvider().list())]


def begun(
    key: str, offer: Offer, told: list[str] | None = None, **settings: object
) -> Future[Handle]:
    """A launch that goes on; ``told`` gets what it waits for."""

    async def launch() -> Handle:
        with listening((told if told is not None else []).append):
            return await provider().launch(offer, Request(on="sky", **settings), key)

    return asyncio.run_coroutine_threadsafe(launch(), portal().loop)


def test_it_is_not_installed_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path))
    (problem,) = SkyProvider().check()
    assert problem.what == "SkyPilot is not installed."
    assert portal().call(SkyProvider().list()) == []
    assert not (tmp_path / "cache" / "tools").exists()


def test_its_optimizer_chooses_the_cheapest_and_has_others_at_hand(cluster: Cluster) -> None:
    found = offers(provider(), "H100|A10")
    assert [(str(one.gpu), one.place, one.price.micro_per_hour) for one in found] == [
        ("A10", "Slurm cheap", 1_100_000),
        ("A10", "Slurm dear", 1_500_000),
    ]
    assert {one.price.source for one in found} == {"SkyPilot's settings"}
    quote = str(market.Quote("sky", provider(), found[0]))
    assert quote.startswith("A10 on sky (Slurm cheap) at $1.10/h (SkyPilot's settings, ")
    (named,) = offers(provider("slurm/dear"), "A10")
    assert named.place == "Slurm dear"
    assert {one.price.source for one in offers(provider())} == {"your own cluster"}


def test_machines_that_are_not_spot_take_the_place_of_those_that_are_not_there(
    cluster: Cluster,
) -> None:
    """Slurm has none."""
    with pytest.raises(RequestError, match="on=sky has no gpu=A10"):
        offers(SkyProvider(Options(cpus="1", spot=True)), "A10")
    found = offers(SkyProvider(Options(cpus="1", spot=True, on_demand=True)), "A10")
    assert [one.place for one in found] == ["Slurm cheap", "Slurm dear"]
    assert {one.data["spot"] for one in found} == {""}


def test_what_cannot_be_had_is_explained(cluster: Cluster) -> None:
    with pytest.raises(RequestError, match=r"on=sky has no gpu=H100\. .* satisfying"):
        offers(provider(), "H100")
    with pytest.raises(RequestError, match=r"on=sky:lambda has no gpu=A10.*ambda"):
        offers(provider("lambda"), "A10")
    assert provider("slurm").check() == []
    (problem,) = provider("lambda").check()
    assert problem.what == "lambda is not enabled in SkyPilot." and "check lambda" in problem.mend
    # Between the offer and the launch it may be gone.
    (offer,) = offers(provider("slurm/dear"), "A10")
    full = replace(offer, gpu=Gpu("A10", 3))
    with pytest.raises(NoCapacity, match="satisfying"):
        begun("full", full).result()
    assert clusters() == [] and jobs(cluster) == []


def test_clouds_whose_machines_do_not_turn_themselves_off_are_those_of_the_docs(
    cluster: Cluster,
) -> None:
    code = """
import runpy, sys, sky
from sky.utils.registry import CLOUD_REGISTRY
turns_itself_off = runpy.run_path(sys.argv[1])["_turns_itself_off"]
asked = {name: cloud for name, cloud in CLOUD_REGISTRY.items() if name not in sys.argv[2:]}
print(*sorted(name for name in asked if not turns_itself_off(sky.Resources(cloud=asked[name]))))
"""
    python = tools.python_of(TOOL)
    need_packages = ["kubernetes", "ssh"]
    command = [str(python), "-I", "-c", code, str(TOOL.script), *need_packages]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["hyperbolic", "primeintellect", "verda", "yotta"]


def test_a_launch_that_fails_is_taken_down(cluster: Cluster) -> None:
    told: list[str] = []
    launch = begun("failing", offers(provider(), "A10")[0], told, time=3600.0)
    until(lambda: len(jobs(cluster)) == 1, "the job", patience=240)
    (job,) = jobs(cluster)
    assert job.startswith("mlinfra-failing-") and job.endswith(" 1:10:00")
    (found,) = portal().call(SkyProvider().list())
    assert found == Handle("sky", "failing", {"cluster": "mlinfra-failing"})
    assert portal().call(SkyProvider().status(found)).alive
    with pytest.raises(ProviderError, match=r"SkyPilot failed: Failed to (run setup|set up)"):
        launch.result()
    assert "Launching on Slurm cheap (main)." in told, told
    assert jobs(cluster) == [] and clusters() == []
    assert portal().call(SkyProvider().status(found)).reason.startswith("its cluster is gone")
    portal().call(SkyProvider().stop(found))  # gone already


def test_a_launch_that_is_cancelled_leaves_nothing(cluster: Cluster) -> None:
    launch = begun("cancelled", offers(provider(), "A10")[0])
    until(lambda: len(jobs(cluster)) == 1, "the job", patience=240)
    launch.cancel()
    until(lambda: not jobs(cluster), "the job to end", patience=120)
    until(lambda: not clusters(), "the cluster to go", patience=120)


def test_a_killed_process_leaves_nothing(cluster: Cluster) -> None:
    code = """
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.providers.sky import Options, SkyProvider
from mlinfra_sdk.spec import Request
provider, request = SkyProvider(Options(cpus="1")), Request(on="sky")
offer = portal().call(provider.offers(request))[0]
portal().call(provider.launch(offer, request, "killed"))
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: len(jobs(cluster)) == 1, "the job", patience=240)
    process.kill()
    process.wait()
    until(lambda: not jobs(cluster), "the job to end", patience=120)
    until(lambda: not clusters(), "the cluster to go", patience=120)


# Seconds that it lives at least, why it ends, and the status of the cluster's job (guard.sh).
ENDS: dict[str, tuple[Limits, float, str, int]] = {
    "idle": (Limits(idle=2.0), 2.0, "idle for 2 s", 21),
    "time": (Limits(time=3.0), 3.0, "its time of 3 s was over", 22),
    "lease": (Limits(lease=4.0), 4.0, "no client for 4 s", 23),
    "budget": (Limits(paid=5.0, budget="month_budget=$1"), 5.0, "its budget was spent: month", 25),
}


def test_its_job_ends_with_the_agent_and_the_ledger_knows_when(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster turns itself off behind its job, which is SkyPilot's own doing."""
    (offer,), ledger = offers(provider("slurm/cheap")), Ledger.open()
    its_jobs: dict[str, str] = {}
    with running(tmp_path / "node") as node:
        # The name for ssh that SkyPilot would write.
        node.configure(node.config.replace("Host box", "Host box mlinfra-*"))
        monkeypatch.setenv("PATH", f"{node.folder}/client:{os.environ['PATH']}")
        for name, (limits, _, _, _) in ENDS.items():
            key = ledger.intend_machine(name=name, provider="sky", price=offer.price)
            begun = time.time()
            run = provider()._task(offer, Request(on="sky"), key)["run"]
            its_jobs[name] = cluster.command(
                *("sbatch", "--parsable", "--output=/dev/null"),
                f"--wrap=export HOME={node.home}; {run}",
            ).strip()
            monkeypatch.setattr("mlinfra_sdk.providers.remote.limits_of", lambda _, it=limits: it)
            where = {"cluster": f"{PREFIX}{key}"}
            handle = portal().call(provider().start_agent(where, Request(on="sky"), key))
            ledger.machine_started(key, handle=handle.to_json(), at=begun)
        until(lambda: not jobs(cluster), "the jobs to end", lambda: jobs(cluster))
        told = {name: ended(cluster, job) for name, job in its_jobs.items()}
        # Whoever took the moment at which it is noticed for the end would be wrong by seconds.
        until(lambda: time.time() > max(at for at, _ in told.values()) + 3, "some seconds to pass")
        assert portal().call(lifecycle.settle(ledger)) == []
        node.hosts = tuple(f"{PREFIX}{it.id}" for it in ledger.machines())
        node.hang_up()
    for known in ledger.machines():
        _, least, reason, status = ENDS[known.name]
        at, its_status = told[known.name]
        assert known.stop_reason.startswith(reason) and its_status == status
        assert known.started_at is not None and known.stopped_at is not None
        assert known.started_at + least <= known.stopped_at <= at + 1  # Slurm tells whole seconds
    ledger.close()


def ended(cluster: Cluster, job: str) -> tuple[float, int]:
    """When a job has ended, and its status."""
    told = cluster.command("scontrol", "show", "job", job)
    found = re.search(r"ExitCode=(\d+):.*EndTime=(\S+)", told, re.S)
    assert found is not None, told
    return datetime.fromisoformat(found[2]).timestamp(), int(found[1])


@pytest.mark.parametrize(
    ("gpu", "names"),
    [
        ("A10", {"A10": 1, "A10G": 1}),
        ("A100:2", {"A100": 2, "A100-80GB": 2, "A100-80GB-SXM": 2}),
        ("A100-40GB", {"A100": 1}),
        ("140GB", {"H200": 1, "H200-SXM": 1, "B200": 1, "MI300X": 1}),
    ],
)
def test_names(gpu: str, names: dict[str, int]) -> None:
    wishes = parse_gpus(gpu)
    assert wishes is not None
    assert names_for(wishes.alternatives[0]) == names
