"""``on=kubernetes`` with the real ``kubectl`` against the emulator, whose pods have real agents and
kernels."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import kr8s
import pytest
from emulators.kubernetes import Emulator, Pod, emulator
from live import opened, until

from mlinfra_sdk import providers
from mlinfra_sdk.catalog import parse_gpus
from mlinfra_sdk.errors import (
    LinkError,
    MachineLost,
    MlinfraError,
    NoCapacity,
    ProviderError,
    RequestError,
)
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines.claim import is_claimed
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.providers.base import Handle
from mlinfra_sdk.providers.kubernetes import KubernetesProvider, Options
from mlinfra_sdk.providers.kubernetes.pools import model
from mlinfra_sdk.providers.waiting import listening
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request
from mlinfra_sdk.testing import ProviderSuite


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, prepared: Callable[[Path], None]
) -> Iterator[tuple[Emulator, Path]]:
    """A cluster, and a folder with a user's settings and configuration of kubectl."""
    folder = tmp_path_factory.mktemp("kubernetes")
    prepared(folder)
    config = folder / "config.toml"
    config.write_text(
        f'[targets.pods]\nprovider = "kubernetes"\nhome = "{folder}/host"\n'
        f'[targets.tolerant]\nprovider = "kubernetes"\nhome = "{folder}/host"\n'
        'tolerations = ["team=ml:NoSchedule"]\n'
        "[prices]\nkubernetes.A10 = 0.9\n"
    )
    with pytest.MonkeyPatch.context() as patch, emulator() as it:
        patch.setenv("KUBECONFIG", str(it.kubeconfig(folder / "kubeconfig")))
        patch.setenv("HOME", str(folder))  # where kubectl keeps what it has found out
        patch.setenv("MLINFRA_HOME", str(folder))
        patch.setattr("mlinfra_sdk.paths.config_file", lambda: config)
        yield it, folder


@pytest.fixture
def cluster(service: tuple[Emulator, Path]) -> Iterator[Emulator]:
    """It is whole at first, and no pod may be left."""
    it, _ = service
    yield it
    it.heal()
    assert it.objects() == []


@pytest.fixture
def provider(service: tuple[Emulator, Path]) -> Callable[..., KubernetesProvider]:
    """Makes providers with these options."""
    return lambda **options: KubernetesProvider(Options(home=f"{service[1]}/host", **options))


class TestKubernetes(ProviderSuite):
    on = "pods"
    cluster: Emulator

    @pytest.fixture(autouse=True)
    @staticmethod
    def _cluster(request: pytest.FixtureRequest, cluster: Emulator) -> None:
        request.cls.cluster = cluster

    @contextmanager
    def broken(self) -> Iterator[None]:
        self.cluster.faults.missing_images = True
        try:
            yield
        finally:
            self.cluster.heal()


def session(**settings: object) -> Session:
    settings = {"on": "pods", "env": "none", "sync": False} | settings
    return Session(namespace={}, request=Request(**settings))


async def launched(provider: KubernetesProvider, key: str, **settings: object) -> Handle:
    request = Request(**{"on": "pods", "env": "none"} | settings)
    offers = await provider.offers(request)
    return await provider.launch(offers[0], request, key)


def test_cells_run_in_a_pod_which_ends_with_its_reason(cluster: Emulator) -> None:
    it = session(time=3600.0, idle=2.0, machine="lonely")
    it.push(x=[1])
    it.run("import os; x.append(2); pod = os.environ['TEST_POD_UID']")
    (pod,) = cluster.pods()
    assert it.namespace["x"] == [1, 2] and it.namespace["pod"] == pod.uid
    spec = pod.spec
    assert spec["activeDeadlineSeconds"] == 4200 and spec["restartPolicy"] == "Never"
    assert spec["automountServiceAccountToken"] is False
    assert pod.only["image"].endswith("-slim")
    assert pod.only["resources"] == {"requests": {"cpu": "1", "memory": "4Gi"}}
    machine = it.machine
    assert machine is not None and pod.metadata["labels"]["mlinfra-key"] == machine.id
    secret = portal().call(machine.provider.secret(machine.handle))
    assert secret.hex() not in repr(pod.as_json()) and len(secret) == 32
    it.close()
    until(lambda: not cluster.pods(), "the pod to end")
    status = portal().call(machine.provider.status(machine.handle))
    assert status.reason == "idle for 2 s" and status.ended_at
    portal().call(machine.provider.stop(machine.handle))


def test_the_budget_of_a_machine_shortens_its_deadline(cluster: Emulator) -> None:
    with session(time=36_000.0, price=3_600_000, machine_budget=720_000) as it:
        it.run("1")
        (pod,) = cluster.pods()
        assert pod.spec["activeDeadlineSeconds"] == 720 + 600


def killed(cluster: Emulator, pod: Pod) -> None:
    """The agent itself, as the kernel does when memory runs out."""
    assert pod.main is not None
    os.kill(pod.main, signal.SIGKILL)


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (Emulator.evict, "it was evicted: The node was low on resource: memory"),
        (Emulator.preempt, "its pod is gone|Kubernetes took it away .* of higher priority"),
        (killed, "it used more memory than it was given"),
    ],
)
def test_why_a_pod_was_taken_away_is_told(
    cluster: Emulator,
    provider: Callable[..., KubernetesProvider],
    end: Callable[[Emulator, Pod], None],
    reason: str,
) -> None:
    handle = portal().call(launched(provider(), "t1"))
    (pod,) = cluster.pods()
    end(cluster, pod)
    until(lambda: not cluster.pods(), "the pod to end")
    status = portal().call(provider().status(handle))
    assert not status.alive and re.match(reason, status.reason)
    portal().call(provider().stop(handle))


def test_a_pod_that_is_taken_away_is_a_lost_machine(cluster: Emulator) -> None:
    with session(reconnect=20.0) as it:
        it.push(kept=41)
        (pod,) = cluster.pods()
        cluster.evict(pod)
        # It counts as ended before its processes do, and until then its kernel would answer.
        until(lambda: not pod.processes(), "the pod to go")
        try:
            it.run("kept + 1")  # it may know already, and then starts another one
        except MachineLost:
            it.run("kept + 1")
        assert cluster.pods()[0].uid != pod.uid


def test_another_client_finds_enters_and_deletes_the_pod(
    cluster: Emulator, provider: Callable[..., KubernetesProvider]
) -> None:
    handle = portal().call(launched(provider(), "k1"))
    api = kr8s.api()
    assert {node.name for node in api.get("nodes")} == {"plain", "gpu-1", "gpu-2"}
    (pod,) = api.get("pods", label_selector={"mlinfra-key": "k1"})
    assert pod.namespace == "ml" and pod.status.phase == "Running" and pod.ready()
    done = pod.exec(["sh", "-c", "echo $TEST_POD_UID; echo no >&2; exit 3"], check=False)
    assert (done.stdout.decode().strip(), done.stderr.strip(), done.returncode) == (
        pod.metadata.uid, b"no", 3,
    )  # fmt: skip
    assert list(api.get("pods", label_selector={"mlinfra-key": "other"})) == []
    pod.delete(grace_period=0)
    until(lambda: not cluster.pods(), "the pod to end")
    status = portal().call(provider().status(handle))
    assert not status.alive and status.reason.startswith("its pod is gone")
    portal().call(provider().stop(handle))


def test_kubernetes_ends_it_at_its_deadline_whatever_the_agent_does(
    cluster: Emulator, provider: Callable[..., KubernetesProvider], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlinfra_sdk.providers.kubernetes._LONGEST", 4)
    handle = portal().call(launched(provider(), "d1"))
    until(lambda: not cluster.pods(), "the pod to end")
    status = portal().call(provider().status(handle))
    assert status.reason.startswith("its deadline in Kubernetes was reached")
    portal().call(provider().stop(handle))


def test_what_a_launch_waits_for_is_told_and_it_can_be_given_up(
    cluster: Emulator, provider: Callable[..., KubernetesProvider]
) -> None:
    told: list[str] = []

    def wait_for(*words: str) -> None:
        until(lambda: any(it.startswith(words) for it in told), words[0], lambda: str(told))

    cluster.faults.full = True
    cluster.hold_images()
    with listening(told.append):
        launch = asyncio.run_coroutine_threadsafe(launched(provider(), "w1"), portal().loop)
        wait_for("waiting for capacity: 0/3 nodes are available: 1 Insufficient cpu")
        cluster.faults.full = False
        wait_for('pulling image "docker.io/library/python:')
        launch.cancel()
        until(lambda: cluster.objects() == [], "the pod to go", cluster.objects)
        cluster.heal()
        handle = portal().call(launched(provider(), "w1"))
    wait_for("starting the worker at the pod mlinfra-w1")
    portal().call(provider().stop(handle))


def test_the_card_shows_what_is_waited_for_until_an_interrupt(
    cluster: Emulator, service: tuple[Emulator, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "notebook"
    (folder / "config" / "mlinfra").mkdir(parents=True)
    shutil.copy(service[1] / "config.toml", folder / "config" / "mlinfra")
    cluster.hold_images()
    with opened(folder) as notebook:
        cell = notebook.start("%%remote on=pods\n1")

        def drawn() -> list[str]:
            texts = [str(card["content"]["data"]["text/plain"]) for card in cell.cards]
            return [it for it in texts if it.startswith("Starting the machine: pulling image")]

        notebook.wait(lambda: len(set(drawn())) > 2)  # its clock goes on
        notebook.interrupt()
        notebook.finish(cell)
        assert cell.error[0] == "KeyboardInterrupt"
        assert cluster.objects() == []
        assert cell.cards[-1]["content"]["data"]["text/plain"].startswith("Interrupted")


def test_others_see_what_is_waited_for_and_waiting_is_not_billed(cluster: Emulator) -> None:
    def told() -> str:
        command = [sys.executable, "-m", "mlinfra_sdk.cli", "status", "--json"]
        machines = json.loads(subprocess.check_output(command))["machines"]
        return next((it["waits"] for it in machines if it["name"] == "watched"), "")

    cluster.hold_images()
    with session(machine="watched", price=3_600_000) as it, ThreadPoolExecutor(1) as pool:
        running = pool.submit(it.run, "1")
        try:
            until(lambda: told().startswith('pulling image "docker.io'), "the launch to be seen")
        finally:
            released = time.time()
            cluster.heal()
        assert running.result(60) == 1
        assert told() == "" and not is_claimed("watched")
        known = next(it for it in Ledger.open().machines(active=True) if it.name == "watched")
        assert known.intended_at < released <= (known.started_at or 0)
        it.stop()


def test_a_launch_that_fails_after_the_pod_began_has_cost_something(cluster: Emulator) -> None:
    settings = {"gpu": parse_gpus("A10"), "on": "tolerant", "machine": "refused"}
    with session(**settings) as it, pytest.raises(RequestError, match="no NVIDIA GPU"):
        it.run("1")
    known = next(it for it in Ledger.open().machines() if it.name == "refused")
    assert known.stopped_at is not None and known.stopped_at > (known.started_at or 1e12)


def test_a_cluster_without_room_is_given_up_after_a_while(
    cluster: Emulator, provider: Callable[..., KubernetesProvider]
) -> None:
    cluster.faults.full = True
    with pytest.raises(NoCapacity, match=r"No node took the pod .* in 1s: .*Insufficient cpu"):
        portal().call(launched(provider(wait="1s"), "n1"))


def test_gpus_are_found_by_the_labels_of_nodes(
    cluster: Emulator, provider: Callable[..., KubernetesProvider]
) -> None:
    def offered(gpu: str, **options: object) -> list[str]:
        request = Request(on="pods", gpu=parse_gpus(gpu))
        offers = portal().call(provider(**options).offers(request))
        return [f"{offer.gpu} {offer.price.describe().partition(' (')[0]}" for offer in offers]

    assert offered("A10:2") == ["A10:2 price unknown"]
    assert offered("A10") == ["A10 $0.90/h"]
    assert offered("L4|H100") == ["H100 price unknown"]
    assert offered("24GB") == ["A10 $0.90/h"]
    with pytest.raises(RequestError, match=r"gpu=L4 cannot be met by .* nodes have A10:2, H100:1"):
        offered("L4")
    with pytest.raises(RequestError, match="A10:2"):
        offered("A10:4")
    # Nodes that do not exist before they are needed.
    selector = {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    assert offered("L4", node_selector=selector) == ["L4 price unknown"]
    with pytest.raises(RequestError):
        offered("A10", node_selector=selector)
    cluster.faults.forbidden = {("list", "nodes")}
    with pytest.raises(RequestError, match="may not look at its nodes"):
        offered("A10")
    assert offered("L4", node_selector={"pool": "mine"}) == ["L4 price unknown"]


def test_a_pod_goes_to_the_gpu_and_one_that_has_none_in_fact_is_refused(
    cluster: Emulator, provider: Callable[..., KubernetesProvider]
) -> None:
    """These nodes only say that they have GPUs."""
    cluster.hold_images()
    wanted = provider(tolerations=["team=ml:NoSchedule"])
    launch = asyncio.run_coroutine_threadsafe(
        launched(wanted, "g1", gpu=parse_gpus("A10")), portal().loop
    )
    until(lambda: any("nodeName" in pod.spec for pod in cluster.pods()), "a node")
    (pod,) = cluster.pods()
    assert pod.spec["nodeName"] == "gpu-1" and pod.gpus() == 1
    assert pod.spec["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-A10"}
    cluster.heal()
    with pytest.raises(RequestError, match=r"gpu=A10 cannot be met .* no NVIDIA GPU"):
        launch.result(60)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("NVIDIA-A100-SXM4-80GB", "A100-SXM-80GB"),
        ("Tesla-T4-SHARED", "T4"),
        ("nvidia-tesla-a100", "A100-40GB"),
        ("nvidia-h100-mega-80gb", "H100"),
        ("a10g", "A10G"),
        ("nvidia", ""),
    ],
)
def test_labels_are_names_of_the_catalog(label: str, name: str) -> None:
    assert model(label) == name


def problem(provider: KubernetesProvider) -> str:
    (found,) = provider.check()
    return f"{found.what} {found.mend}"


def test_what_keeps_it_from_working_is_said(
    cluster: Emulator,
    provider: Callable[..., KubernetesProvider],
    service: tuple[Emulator, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert provider().check() == []
    cluster.faults.forbidden = {("create", "pods/exec")}
    assert "may not create pods/exec in the namespace ml" in problem(provider())
    cluster.faults.forbidden = {("create", "pods")}
    with pytest.raises(ProviderError, match=r"refuses: \(Forbidden\): pods is forbidden"):
        portal().call(launched(provider(), "p1"))
    cluster.heal()
    assert "no such context" in problem(provider(context="nowhere"))
    assert "cannot be reached" in problem(provider(context="elsewhere"))
    with pytest.raises(ProviderError, match="there is no such namespace"):
        portal().call(launched(provider(namespace="nobodys"), "p2"))
    with pytest.raises(RequestError, match="is not understood"):
        portal().call(launched(provider(tolerations=["a:b:c"]), "p3"))
    with pytest.raises(ProviderError, match="does not take such a pod"):
        portal().call(launched(provider(memory="much"), "p4"))
    with pytest.raises(LinkError, match="cannot be reached"):
        portal().call(launched(provider(context="elsewhere"), "p5"))
    cluster.faults.missing_images = True
    with pytest.raises(ProviderError, match=r"cannot be pulled \(ImagePullBackOff\).*not found"):
        portal().call(launched(provider(image="nobody/has-this"), "p6"))
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path / "wrong", token="wrong")))
    assert "does not accept your credentials" in problem(provider())
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert "has no cluster" in problem(provider())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no kubectl" in problem(provider())


def test_a_machine_that_cannot_be_asked_may_live(
    cluster: Emulator, provider: Callable[..., KubernetesProvider]
) -> None:
    handle = portal().call(launched(provider(), "u1"))
    cluster.faults.down = True
    status = portal().call(providers.of(handle).status(handle))
    assert status.alive and "cannot be asked" in status.reason
    with pytest.raises(MlinfraError):
        portal().call(providers.of(handle).stop(handle))
    cluster.faults.down = False
    portal().call(providers.of(handle).stop(handle))
    assert not portal().call(providers.of(handle).status(handle)).alive
