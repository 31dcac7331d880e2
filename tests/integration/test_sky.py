"""``on=sky`` with the real SkyPilot: its optimizer, its server, and launches in a real Slurm.

What it sets up on a machine comes from the internet, so here every launch fails at that; what is
looked at is what it chose, what it submitted, and that nothing is left.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
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
from mlinfra_sdk.machines import market
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.providers import tools
from mlinfra_sdk.providers.base import Handle, Offer
from mlinfra_sdk.providers.sky import Options, SkyProvider
from mlinfra_sdk.providers.sky.engine import TOOL
from mlinfra_sdk.providers.sky.names import names_for
from mlinfra_sdk.providers.waiting import listening
from mlinfra_sdk.spec import Request

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
