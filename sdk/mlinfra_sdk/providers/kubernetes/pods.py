"""Pods: how one is asked for, and what its state says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from mlinfra_sdk.catalog import Gpu
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.providers.base import Status
from mlinfra_sdk.providers.kubernetes.pools import RESOURCE
from mlinfra_sdk.worker import spawner
from mlinfra_sdk.worker.folder import LAST_WORDS

CONTAINER = "mlinfra"
HOME = "/mlinfra"
"""A directory that goes with the pod; not in the container's own layer, which may be slow."""
KEY, USER, MANAGER = "mlinfra-key", "mlinfra-user", "app.kubernetes.io/managed-by"
_UNCLAIMED = 900
"""Seconds after which a pod ends that nobody has given an agent."""
GRACE = 30
"""Seconds that a pod has to end after it was told to: Kubernetes' own default."""
_TOLERATION = re.compile(r"(?P<key>[^=:]+)(=(?P<value>[^:]*))?(:(?P<effect>\w+))?")
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_HOPELESS = {
    "ImagePullBackOff": "the image cannot be pulled",
    "InvalidImageName": "the image has no valid name",
    "ErrImageNeverPull": "the image is not on the node",
    "CreateContainerConfigError": "its container cannot be set up",
    "CreateContainerError": "its container cannot be made",
    "RunContainerError": "its container cannot be started",
}
_ENDS = {
    "DeadlineExceeded": "its deadline in Kubernetes was reached",
    "Evicted": "it was evicted",
    "Preempting": "a pod of higher priority took its place",
    "NodeLost": "its node was lost",
    "NodeShutdown": "its node was shut down",
    "Terminated": "its node was shut down",
    "OOMKilled": "it used more memory than it was given",
}


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a pod is made of; ``seconds`` until Kubernetes ends it."""

    name: str
    key: str
    user: str
    image: str
    seconds: int
    gpu: Gpu | None
    cpu: str
    memory: str
    node_selector: Mapping[str, str]
    tolerations: Sequence[str]
    service_account: str
    pull_secret: str


class Waiting(msgspec.Struct, frozen=True):
    """Why a pod does not run yet: in words, whether no node has room for it, and what makes all
    waiting hopeless."""

    text: str
    no_room: bool = False
    hopeless: str = ""


def pipe(key: str) -> str:
    """Where a pod's main process waits for its agent."""
    return f"/tmp/mlinfra-{key}"


def manifest(wanted: Wanted) -> dict[str, Any]:
    """The pod, as the API takes it. Raises :class:`RequestError`."""
    requests = {"cpu": wanted.cpu, "memory": wanted.memory}
    resources: dict[str, Any] = {"requests": {name: it for name, it in requests.items() if it}}
    tolerations = [_toleration(text) for text in wanted.tolerations]
    if wanted.gpu is not None:
        resources["limits"] = {RESOURCE: str(wanted.gpu.count)}
        tolerations.append({"key": RESOURCE, "operator": "Exists", "effect": "NoSchedule"})
    last_words = f"{pipe(wanted.key)}.end"
    environment = {LAST_WORDS: last_words, "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
    container = {
        "name": CONTAINER,
        "image": wanted.image,
        "command": ["sh", "-c", "\n".join(spawner.script(pipe(wanted.key), _UNCLAIMED))],
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "resources": resources,
        "terminationMessagePath": last_words,
        "volumeMounts": [
            {"name": "home", "mountPath": HOME},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": wanted.seconds,
        "terminationGracePeriodSeconds": GRACE,
        "enableServiceLinks": False,
        "nodeSelector": dict(wanted.node_selector),
        "tolerations": tolerations,
        "containers": [container],
        # Without it PyTorch's data loaders have 64 MB; it counts as memory of the pod.
        "volumes": [
            {"name": "home", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    if wanted.service_account:
        spec["serviceAccountName"] = wanted.service_account
    else:  # cells have no business with the cluster's API
        spec["automountServiceAccountToken"] = False
    if wanted.pull_secret:
        spec["imagePullSecrets"] = [{"name": wanted.pull_secret}]
    metadata = {
        "name": wanted.name,
        "labels": {MANAGER: "mlinfra", KEY: wanted.key, USER: wanted.user},
        # What makes room on nodes by moving pods must leave this one alone.
        "annotations": {
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            "karpenter.sh/do-not-disrupt": "true",
        },
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _toleration(text: str) -> dict[str, str]:
    """``key``, ``key:NoSchedule``, ``key=value`` or ``key=value:NoSchedule``."""
    match = _TOLERATION.fullmatch(text)
    if match is None or (match["effect"] or _EFFECTS[0]) not in _EFFECTS:
        raise RequestError(
            f"tolerations = [{text!r}] is not understood.",
            hint="Write them as the taints of nodes, such as key=value:NoSchedule.",
        )
    value = match["value"]
    found = {"key": match["key"], "operator": "Exists" if value is None else "Equal"}
    if value is not None:
        found["value"] = value
    return found | ({"effect": match["effect"]} if match["effect"] else {})


def phase(pod: Mapping[str, Any]) -> str:
    """Kubernetes' word for its state."""
    return str(pod.get("status", {}).get("phase", "Pending"))


def runs(pod: Mapping[str, Any]) -> bool:
    """Whether commands can be run in it."""
    return "running" in _container_state(pod)


def over(pod: Mapping[str, Any]) -> bool:
    """Whether it has run to its end, or is about to be gone."""
    return phase(pod) in ("Succeeded", "Failed") or "deletionTimestamp" in pod["metadata"]


def waiting(pod: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> Waiting:
    """What keeps a pod from running; ``events`` are those about it, as far as they are known."""
    scheduled = _condition(pod, "PodScheduled")
    latest = str(events[-1].get("message", "")) if events else ""
    if scheduled.get("status") != "True":
        if scheduled.get("reason") != "Unschedulable":
            return Waiting("waiting for Kubernetes to place the pod")
        text = str(scheduled.get("message", "no node has room"))
        growing = [it for it in events if it.get("reason") in ("TriggeredScaleUp", "Nominated")]
        more = f" A node is being added: {growing[-1].get('message', '')}" if growing else ""
        return Waiting(f"waiting for capacity: {text}{more}", no_room=True)
    state = _container_state(pod).get("waiting", {})
    reason, message = str(state.get("reason", "")), str(state.get("message", ""))
    if reason in _HOPELESS:
        failed = [str(it["message"]) for it in events if it.get("reason") == "Failed"]
        said = [it for it in failed if "Error:" not in it[:6]] or [message]
        return Waiting(message, hopeless=f"{_HOPELESS[reason]} ({reason}): {said[-1]}")
    return Waiting(_small(latest or message or reason or "starting the container"))


def _small(text: str) -> str:
    return text[:1].lower() + text[1:]


def ending(pod: Mapping[str, Any]) -> Status:
    """Why it has ended: by Kubernetes' word if that ended it, else by the agent's own."""
    status = pod["status"]
    disruption = _condition(pod, "DisruptionTarget")
    ended = _container_state(pod).get("terminated", {})
    at = _seconds(ended.get("finishedAt"))
    for reason, message in (
        (status.get("reason"), status.get("message")),
        (disruption.get("reason"), disruption.get("message")),
        (ended.get("reason"), ""),
    ):
        if reason and (reason in _ENDS or reason == disruption.get("reason")):
            words = _ENDS.get(reason, f"Kubernetes took it away ({reason})")
            return Status(False, f"{words}: {message}" if message else words, at)
    try:
        told = msgspec.json.decode(ended.get("message", ""), type=dict[str, Any])
        return Status(False, str(told["reason"]), float(told["at"]))
    except (msgspec.MsgspecError, KeyError):
        code = ended.get("exitCode", "unknown")
        return Status(False, f"its main process ended with status {code}", at)


def _container_state(pod: Mapping[str, Any]) -> Mapping[str, Any]:
    statuses = pod.get("status", {}).get("containerStatuses", [])
    state: Mapping[str, Any] = statuses[0].get("state", {}) if statuses else {}
    return state


def _condition(pod: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    conditions = pod.get("status", {}).get("conditions", [])
    return next((it for it in conditions if it["type"] == kind), {})


def _seconds(moment: object) -> float | None:
    """Unix time of what the API writes as a time."""
    if not isinstance(moment, str):
        return None
    return datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()
