"""Namespaces, nodes, the scheduler, and what can be made to go wrong."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emulators.kubernetes.pods import Pod

TOKEN = "token-of-the-tests"
_TICK = 0.05
_BACK_OFF = 0.3
_GPU = "nvidia.com/gpu"


@dataclass
class Node:
    """A node with its labels; one that has GPUs keeps away what does not tolerate that."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)
    gpus: int = 0

    def as_json(self) -> dict[str, Any]:
        """As the API shows it."""
        taints = [{"key": _GPU, "value": "present", "effect": "NoSchedule"}]
        return {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": self.name, "labels": self.labels},
            "spec": {"taints": taints} if self.gpus else {},
            "status": {"allocatable": {"cpu": "8", _GPU: str(self.gpus)} if self.gpus else {}},
        }


@dataclass
class Faults:
    """Switches that a test sets; all are off at first."""

    forbidden: set[tuple[str, str]] = field(default_factory=set)
    """(verb, resource) that this user may not do."""
    missing_images: bool = False
    """No registry has any image."""
    full: bool = False
    """No node has room."""
    pulling: asyncio.Event | None = None
    """Images are not there before it is set."""
    down: bool = False
    """The server answers nothing but 503."""


class Cluster:
    """The state of it all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.namespaces = {"default", "ml"}
        self.nodes = [
            Node("plain"),
            Node("gpu-1", {"nvidia.com/gpu.product": "NVIDIA-A10"}, gpus=2),
            Node("gpu-2", {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}, gpus=1),
        ]
        self.faults = Faults()
        self.pods: dict[tuple[str, str], Pod] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, pod: Pod) -> None:
        """Take a pod and let it live."""
        self.pods[pod.namespace, pod.name] = pod
        task = asyncio.create_task(self._live(pod))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _live(self, pod: Pod) -> None:
        try:
            if await self._scheduled(pod) and await self._pulled(pod):
                await pod.run()
            await pod.deleted.wait()
        finally:
            del self.pods[pod.namespace, pod.name]

    async def _scheduled(self, pod: Pod) -> bool:
        while not pod.deleted.is_set():
            why = self._place(pod)
            if not why:
                pod.condition("PodScheduled", True)
                return True
            pod.condition("PodScheduled", False, "Unschedulable", why)
            await asyncio.sleep(_TICK)
        return False

    def _place(self, pod: Pod) -> str:
        """Give it a node, or say why there is none."""
        needed, reasons = pod.gpus(), []
        for node in self.nodes:
            there = [it for it in self.pods.values() if it.spec.get("nodeName") == node.name]
            selector = pod.spec.get("nodeSelector", {}).items()
            tolerated = any(it["key"] == _GPU for it in pod.spec.get("tolerations", []))
            if not selector <= node.labels.items():
                reasons.append("1 node(s) didn't match Pod's node affinity/selector")
            elif node.gpus and not tolerated:
                reasons.append(f"1 node(s) had untolerated taint {{{_GPU}: present}}")
            elif self.faults.full or sum(it.gpus() for it in there) + needed > node.gpus:
                reasons.append(f"1 Insufficient {_GPU if needed else 'cpu'}")
            else:
                pod.spec["nodeName"] = node.name
                return ""
        return f"0/{len(self.nodes)} nodes are available: {', '.join(reasons)}."

    async def _pulled(self, pod: Pod) -> bool:
        image = pod.only["image"]
        pod.waits("ContainerCreating")
        pod.told("Scheduled", f"Successfully assigned {pod.name} to {pod.spec['nodeName']}")
        pod.told("Pulling", f'Pulling image "{image}"')
        if self.faults.pulling is not None:
            either = (self.faults.pulling, pod.deleted)
            waits = [asyncio.ensure_future(event.wait()) for event in either]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for it in waits:
                it.cancel()
        while self.faults.missing_images and not pod.deleted.is_set():
            text = f'failed to pull image "{image}": not found'
            pod.told("Failed", text)
            pod.waits("ErrImagePull", text)
            await asyncio.sleep(_BACK_OFF)
            pod.waits("ImagePullBackOff", f'Back-off pulling image "{image}"')
            await asyncio.sleep(_BACK_OFF)
        return not pod.deleted.is_set()

    async def close(self) -> None:
        """End all pods."""
        for pod in list(self.pods.values()):
            pod.end("Failed")
            pod.deleted.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)
