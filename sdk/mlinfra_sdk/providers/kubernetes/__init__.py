"""``on=kubernetes``: a pod of a cluster that the user's ``kubectl`` can reach.

The pod's main process becomes the agent (``worker/spawner.py``), so the pod ends when the agent
does, and an autoscaler can take its node away; ``activeDeadlineSeconds`` is the hard stop. Commands
run in it by ``kubectl exec``.
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar
from urllib.parse import quote

import anyio
import msgspec
from anyio.from_thread import start_blocking_portal

from mlinfra_sdk import units
from mlinfra_sdk.catalog import Gpu, Gpus
from mlinfra_sdk.catalog.prices import rates_for
from mlinfra_sdk.errors import LinkError, MlinfraError, NoCapacity, ProviderError, RequestError
from mlinfra_sdk.ledger import Price
from mlinfra_sdk.link.processes import open_process
from mlinfra_sdk.link.wire import ProcessWire
from mlinfra_sdk.providers.base import Capabilities, Handle, Offer, Problem, Status, longest
from mlinfra_sdk.providers.kubernetes import pods
from mlinfra_sdk.providers.kubernetes.kubectl import Exists, Missing, Place, place
from mlinfra_sdk.providers.kubernetes.pools import LABELS, Pool, model, pools
from mlinfra_sdk.providers.remote import ExecProvider, Remote
from mlinfra_sdk.providers.waiting import runs, tell
from mlinfra_sdk.spec import Request
from mlinfra_sdk.worker import spawner

_START_SECONDS = 15.0
_LONGEST = 24 * 3600
"""Seconds that a pod may live if ``time=`` does not say."""
_MARGIN = 600
"""Seconds that the agent's own limit comes before Kubernetes' deadline."""
_STARTING = 1800.0
"""Seconds that a pod which has a node may take to run: nodes pull images of many gigabytes."""
_GRACE = 10
"""Seconds that an agent has to end in order."""
_GONE = 120.0
_REVIEW = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a target: the ``context`` and ``namespace`` of kubectl's configuration (default: the
    current ones); the ``image``, which needs a POSIX shell with the usual commands and either
    Python of this minor version or uv (default: the official image of Python); ``cpu`` and
    ``memory`` that are guaranteed; ``node_selector``, ``tolerations``, ``service_account`` and
    ``pull_secret`` of the pods; how long to ``wait`` for room on a node; where to keep everything
    (``home``) and which ``python`` to use inside."""

    context: str = ""
    namespace: str = ""
    image: str = ""
    cpu: str = "1"
    memory: str = "4Gi"
    node_selector: dict[str, str] = {}
    tolerations: list[str] = []
    service_account: str = ""
    pull_secret: str = ""
    wait: str = "10m"
    home: str = f"{pods.HOME}/host"
    python: str = ""


class PodRemote(Remote):
    """Commands inside of a pod."""

    def __init__(self, cluster: Place, pod: str, key: str) -> None:
        self.where = f"the pod {pod}"
        self._cluster = cluster
        self._pod = pod
        self._pipe = pods.pipe(key)

    async def exec(self, argv: Sequence[str]) -> ProcessWire:
        """Beside its main process."""
        command = ["exec", "--stdin", self._pod, f"--container={pods.CONTAINER}", "--"]
        spawn = ["env", f"{spawner.VARIABLE}={self._pipe}"]
        return await open_process(self._cluster.command(*command, *spawn, *argv))

    def interactive(self, argv: Sequence[str]) -> list[str]:
        """Beside its main process, too."""
        words = ["exec", "--stdin", "--tty", self._pod, f"--container={pods.CONTAINER}", "--"]
        return list(self._cluster.command(*words, *argv))

    def explain(self, complaint: str) -> LinkError:
        """What kubectl complained of."""
        fault = self._cluster.fault(complaint or "no answer")
        if isinstance(fault, LinkError):
            return fault
        return LinkError(f"{self.where} cannot be reached: {fault.message}", hint=fault.hint)


class KubernetesProvider(ExecProvider):
    """Pods of one context and namespace."""

    name: ClassVar[str] = "kubernetes"
    capabilities = Capabilities(hard_stop="provider")
    options: ClassVar[type[msgspec.Struct]] = Options
    argument: ClassVar[str] = "context"
    grace: ClassVar[float] = pods.GRACE - 2.0

    def __init__(self, options: Options | None = None) -> None:
        self._options = options or Options()

    def check(self) -> list[Problem]:
        """Whether kubectl is here, and the cluster lets us make pods and run commands in them."""
        if shutil.which("kubectl") is None:
            return [Problem("There is no kubectl here.", "https://kubernetes.io/docs/tasks/tools/")]
        try:
            with start_blocking_portal() as portal:
                return portal.call(self._permissions)
        except MlinfraError as error:
            return [Problem(error.message, error.hint)]

    async def _permissions(self) -> list[Problem]:
        cluster = await self._place()
        problems = []
        for verb, resource, part in (
            ("create", "pods", ""),
            ("get", "pods", ""),
            ("list", "pods", ""),
            ("delete", "pods", ""),
            ("create", "pods", "exec"),
        ):
            attributes = {"namespace": cluster.namespace, "verb": verb, "resource": resource}
            if part:
                attributes["subresource"] = part
            review = {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": attributes},
            }
            answer = await cluster.api("create", _REVIEW, "-f", "-", body=review)
            if not answer["status"]["allowed"]:
                what = f"{resource}/{part}" if part else resource
                problems.append(
                    Problem(
                        f"You may not {verb} {what} in the namespace {cluster.namespace}.",
                        "Ask who runs the cluster for the role `edit` there, or name another "
                        "namespace in the target.",
                    )
                )
        return problems

    async def _place(self) -> Place:
        return await place(self._options.context, self._options.namespace)

    def remote(self, data: Mapping[str, str]) -> Remote:
        """Commands run in the pod."""
        return PodRemote(_place_of(data), data["pod"], data["key"])

    # -- offers --------------------------------------------------------------------------------

    async def offers(self, request: Request) -> list[Offer]:
        """Pods with the GPUs that nodes have by their labels, or that ``node_selector`` promises.
        Whether one is free is known when the pod has a node."""
        cluster = await self._place()
        if request.gpu is None:
            return [Offer(self.name, None, _price(request, None), _START_SECONDS)]
        found = await _pools(cluster)
        offers = []
        for wish in request.gpu.alternatives:
            named = self._named(wish, found or [])
            if named is not None:
                gpu = Gpu(named[0], wish.count)
                offers.append(Offer(self.name, gpu, _price(request, gpu), _START_SECONDS))
        if not offers:
            raise RequestError(
                f"gpu={request.gpu} cannot be met by on={cluster}: {_described(found)}.",
                hint="If the cluster adds nodes on demand, or names its GPUs by a label of its own,"
                " say which nodes to take by node_selector of the target.",
            )
        return offers

    def _named(self, wish: Gpu, found: Sequence[Pool]) -> tuple[str, dict[str, str]] | None:
        """The name of the GPU that meets a wish, and labels of the nodes to be taken for it; what
        the user says of nodes comes first."""
        own = self._options.node_selector
        if own:
            promised = next((model(own[label]) for label in LABELS if label in own), "")
            if promised and not wish.met_by(Gpu(promised, wish.count)):
                return None
            return promised or wish.name, {}
        pool = next((it for it in found if it.meets(wish)), None)
        return (pool.name, {pool.label: pool.value}) if pool is not None else None

    # -- machines ------------------------------------------------------------------------------

    async def launch(
        self, offer: Offer, request: Request, key: str, previous: Handle | None = None
    ) -> Handle:
        """Make a pod, wait until it runs, and start an agent in it; see :meth:`Provider.launch`.

        Raises :class:`NoCapacity` if no node had room for it within ``wait``."""
        patience = self._patience()
        cluster = await self._place()
        labels: dict[str, str] = {}
        if offer.gpu is not None:
            named = self._named(offer.gpu, await _pools(cluster) or [])
            labels = named[1] if named is not None else {}
        pod = self._manifest(longest(request, offer.price), offer.gpu, key, labels)
        name: str = pod["metadata"]["name"]
        data = _data(cluster, name, key)
        try:
            tell("making the pod")
            # The server may have got a request that is not waited for any more.
            with anyio.CancelScope(shield=True):
                await _make(cluster, name, pod)
            await _until_running(cluster, name, patience)
            return await self.start_agent(
                data,
                request,
                key,
                previous,
                home=self._options.home,
                python=self._options.python,
            )
        except BaseException:
            # If that fails, too, the pod ends by itself.
            with anyio.CancelScope(shield=True), suppress(MlinfraError):
                await _remove(cluster, name, grace=0)
            raise

    def _patience(self) -> float:
        try:
            return units.parse_duration(self._options.wait)
        except ValueError:
            raise RequestError(
                f"wait = {self._options.wait!r} is no duration.", hint="Write it as 10m or 1h."
            ) from None

    def _manifest(
        self, seconds: float | None, gpu: Gpu | None, key: str, labels: Mapping[str, str]
    ) -> dict[str, Any]:
        options = self._options
        python = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return pods.manifest(
            pods.Wanted(
                name=f"mlinfra-{key}",
                key=key,
                user=_user(),
                image=options.image or f"docker.io/library/python:{python}-slim",
                seconds=_LONGEST if seconds is None else int(seconds) + _MARGIN,
                gpu=gpu,
                cpu=options.cpu,
                memory=options.memory,
                node_selector={**options.node_selector, **labels},
                tolerations=options.tolerations,
                service_account=options.service_account,
                pull_secret=options.pull_secret,
            )
        )

    async def status(self, handle: Handle) -> Status:
        """As Kubernetes tells; an agent that ended has left its last words there."""
        try:
            pod = await _place_of(handle.data).get(f"pods/{handle.data['pod']}")
        except Missing:
            return Status(False, "its pod is gone: deleted, preempted, or lost with its node")
        except (LinkError, ProviderError) as error:
            return Status(True, f"it cannot be asked: {error.message}")
        if pods.phase(pod) in ("Succeeded", "Failed"):
            return pods.ending(pod)
        return await super().status(handle) if pods.runs(pod) else Status(True)

    async def stop(self, handle: Handle) -> None:
        """Delete the pod, and with it all that it holds."""
        await _remove(_place_of(handle.data), handle.data["pod"], _GRACE)

    async def list(self) -> list[Handle]:
        """Every pod of ours that waits or runs."""
        cluster = await self._place()
        selector = quote(f"{pods.MANAGER}=mlinfra,{pods.USER}={_user()}")
        found = await cluster.get(f"pods?labelSelector={selector}")
        handles = []
        for pod in found["items"]:
            if not pods.over(pod):
                metadata = pod["metadata"]
                key = metadata["labels"][pods.KEY]
                handles.append(Handle(self.name, key, _data(cluster, metadata["name"], key)))
        return handles


def _data(cluster: Place, pod: str, key: str) -> dict[str, str]:
    named = {"context": cluster.context, "namespace": cluster.namespace}
    return {**named, "pod": pod, "key": key}


def _place_of(data: Mapping[str, str]) -> Place:
    return Place(data["context"], data["namespace"])


def _user() -> str:
    """Who makes these pods, as a label: a namespace may be shared."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        name = str(os.getuid())
    return re.sub("[^A-Za-z0-9]+", "-", name)[:60].strip("-") or "user"


def _price(request: Request, gpu: Gpu | None) -> Price:
    """What ``price=`` says, else the user's own ``[prices]`` for ``kubernetes``."""
    if request.price:
        return Price(request.price, "set by price=", time.strftime("%Y-%m-%d"))
    fits = rates_for(Gpus((gpu,)), KubernetesProvider.name) if gpu is not None else []
    if not fits:
        return Price.unknown()
    return Price(fits[0].micro_per_hour, fits[0].rate.source, fits[0].rate.date)


async def _pools(cluster: Place) -> list[Pool] | None:
    """The cluster's GPUs; None if this user may not look at its nodes."""
    try:
        return pools((await cluster.get("nodes", cluster=True))["items"])
    except Missing:
        return None
    except ProviderError as error:
        if "orbidden" in error.message:
            return None
        raise


def _described(found: Sequence[Pool] | None) -> str:
    if found is None:
        return "you may not look at its nodes, so what they have is not known"
    have = ", ".join(sorted({f"{it.name}:{it.count}" for it in found}))
    return f"its nodes have {have}" if have else "no node has a label that names its GPU"


async def _make(cluster: Place, name: str, pod: Mapping[str, Any]) -> None:
    """Make a pod, unless it is there; one that has ended makes room for it."""
    for _ in range(2):
        with suppress(Exists):
            await cluster.post("pods?fieldValidation=Strict", pod)
            return
        with suppress(Missing):
            if not pods.over(await cluster.get(f"pods/{name}")):
                return
        await _remove(cluster, name, grace=0)
    raise ProviderError(f"The pod {name} is being made and removed by others.", hint="Try again.")


async def _until_running(cluster: Place, name: str, patience: float) -> None:
    """Wait for a node, the image and the container, and tell what for."""
    pause, began = 0.1, time.monotonic()
    unplaced = began
    while True:
        pod = await _must_be_there(cluster, name)
        if pods.over(pod):
            raise ProviderError(
                f"The pod {name} ended before it began: {pods.ending(pod).reason}.",
                hint=f"Its image needs sh, mkfifo, timeout and head: kubectl describe pod {name}",
            )
        if pods.runs(pod):
            runs()
            return
        reason = pods.waiting(pod, await _events(cluster, name))
        tell(reason.text)
        now = time.monotonic()
        if reason.hopeless:
            raise ProviderError(
                f"The pod {name} cannot start: {reason.hopeless}",
                hint="Check image, pull_secret and the other options of the target.",
            )
        if not reason.no_room:
            unplaced = now
        elif now - unplaced > patience:
            raise NoCapacity(
                f"No node took the pod {name} in {units.format_duration(patience)}: {reason.text}",
                hint="Ask for less, or wait for longer by wait= of the target.",
            )
        if now - began > max(_STARTING, patience + _STARTING):
            raise ProviderError(
                f"The pod {name} did not start in {units.format_duration(now - began)}: "
                f"{reason.text}",
                hint=f"kubectl describe pod {name}",
            )
        await anyio.sleep(pause)
        pause = min(pause * 1.5, 3)


async def _must_be_there(cluster: Place, name: str) -> Any:
    try:
        return await cluster.get(f"pods/{name}")
    except Missing:
        raise ProviderError(
            f"The pod {name} was deleted while it waited.", hint="Try again."
        ) from None


async def _events(cluster: Place, name: str) -> list[Any]:
    """What happened to a pod, oldest first; nothing if this user may not know."""
    with suppress(ProviderError):
        found = await cluster.get(f"events?fieldSelector=involvedObject.name%3D{name}")
        return sorted(found["items"], key=lambda it: it.get("lastTimestamp") or "")
    return []


async def _remove(cluster: Place, name: str, grace: int) -> None:
    """Delete a pod and wait until it is gone. No error for one that is."""
    with suppress(Missing):
        await cluster.delete(f"pods/{name}?gracePeriodSeconds={grace}")
        pause, end = 0.1, time.monotonic() + grace + _GONE
        while time.monotonic() < end:
            await cluster.get(f"pods/{name}")
            await anyio.sleep(pause)
            pause = min(pause * 1.5, 2)
        raise ProviderError(
            f"The pod {name} does not go: its node may be lost.",
            hint=f"Look at it: kubectl describe pod {name}",
        )
