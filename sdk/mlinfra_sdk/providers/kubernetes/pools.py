"""Which GPUs a cluster has, by the labels of its nodes.

There is no one label for a GPU's model: NVIDIA's discovery, GKE, the autoscalers of EKS and others
have their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from mlinfra_sdk.catalog import Device, Gpu, catalog

RESOURCE = "nvidia.com/gpu"
LABELS = (
    "nvidia.com/gpu.product",  # NVIDIA's GPU feature discovery
    "cloud.google.com/gke-accelerator",
    "k8s.amazonaws.com/accelerator",
    "karpenter.k8s.aws/instance-gpu-name",
    "gpu.nvidia.com/class",  # CoreWeave
)
"""Labels whose value is a model, the most precise first."""
_GKE = {"nvidia-tesla-a100": "A100-40GB"}
"""Names that mean less than they say: https://cloud.google.com/kubernetes-engine/docs/how-to/gpus"""


class Pool(msgspec.Struct, frozen=True):
    """Nodes with the same label, and how many GPUs one of them has at most."""

    label: str
    value: str
    name: str
    count: int

    def meets(self, wish: Gpu) -> bool:
        """Whether a pod can have it there, when they are free."""
        return self.count >= wish.count and wish.met_by(Gpu(self.name, wish.count))


def model(value: str) -> str:
    """The catalog's name for the value of a label; empty if it is none."""
    known = catalog()
    plain = re.sub(r"-(SHARED|MIG-.*)$", "", value)
    name = known.part_of_device(Device(plain, 0)) or _GKE.get(plain) or known.canonical(plain)
    if name is None:  # nvidia-h100-80gb, nvidia-h100-mega-80gb, nvidia-h200-141gb
        name = known.canonical(re.sub(r"(-mega)?-\d+gb$", "", plain))
    return name or ""


def pools(nodes: Iterable[Mapping[str, Any]]) -> list[Pool]:
    """Those of these nodes, as the API shows them."""
    most: dict[tuple[str, str], int] = {}
    for node in nodes:
        count = int(node["status"].get("allocatable", {}).get(RESOURCE, 0))
        labels = node["metadata"].get("labels", {})
        label = next((it for it in LABELS if labels.get(it) and model(labels[it])), None)
        if count and label is not None:
            key = (label, labels[label])
            most[key] = max(count, most.get(key, 0))
    return [Pool(label, value, model(value), count) for (label, value), count in most.items()]
