"""Clouds of the test's own, as plug-ins that other people would install, and recorded GPUs.

Their machines are agents on this computer. ``$CLOUDS`` says what each offers; the real NVML
interface finds in their machines what a real driver once answered (``nvml.c``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio

from mlinfra_sdk import targets
from mlinfra_sdk.catalog import Gpu, Rate
from mlinfra_sdk.errors import NoCapacity, ProviderError
from mlinfra_sdk.ledger import Price
from mlinfra_sdk.providers.base import Capabilities, Handle, Offer, Problem
from mlinfra_sdk.providers.local import LocalProvider
from mlinfra_sdk.spec import Request

GPUS = "RECORDED_GPUS"
# As nvidia-smi lists them: name, memory.total.
A10G = "NVIDIA A10G=23028"
T4 = "Tesla T4=15360"
H100 = "NVIDIA H100 80GB HBM3=81559"


class Cloud(LocalProvider):
    """One that behaves as ``$CLOUDS`` says."""

    capabilities = Capabilities(hard_stop="provider", shared_fs=True)

    @property
    def _plan(self) -> dict[str, Any]:
        plan: dict[str, Any] = json.loads(os.environ.get("CLOUDS", "{}")).get(self.name, {})
        return plan

    def check(self) -> list[Problem]:
        return [] if self._plan else [Problem("There is no token.", "make one")]

    async def offers(self, request: Request) -> list[Offer]:
        if self._plan.get("hangs"):
            await anyio.sleep_forever()
        if "error" in self._plan:
            raise ProviderError(self._plan["error"])
        found = []
        for name, usd in self._plan.get("gpus", {}).items():
            price = Price.unknown()
            if usd is not None:
                price = Price(round(usd * 1e6), f"https://{self.name}.example/x", "2026-11-25")
            gpu = Gpu(name)
            if request.gpu is not None and request.gpu.rank(gpu) is not None:
                found.append(Offer(self.name, gpu, price, 30.0))
        return found

    async def launch(
        self, offer: Offer, request: Request, key: str, previous: Handle | None = None
    ) -> Handle:
        if self._plan.get("full"):
            raise NoCapacity(f"No {offer.gpu} is free.")
        os.environ[GPUS] = self._plan["has"]
        try:
            return await super().launch(offer, request, key, previous)
        finally:
            del os.environ[GPUS]

    async def rates(self) -> list[Rate]:
        if "error" in self._plan:
            raise ProviderError(self._plan["error"])
        return [
            Rate(vendor=self.name, gpu=name, usd_per_hour=usd, source=self.name, date="2026-11-25")
            for name, usd in self._plan.get("gpus", {}).items()
        ]


class Cheap(Cloud):
    name = "cheap"


class Dear(Cloud):
    name = "dear"


class Odd(Cloud):
    """Its machines go on if their worker fails."""

    name = "odd"
    capabilities = Capabilities(hard_stop="worker", shared_fs=True)


@contextmanager
def clouds(folder: Path, **plans: object) -> Iterator[None]:
    """The clouds ``cheap``, ``dear`` and ``odd`` are installed for this process and those that it
    starts; those with a plan are set up."""
    information = folder / "clouds-1.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: clouds\nVersion: 1\n")
    (information / "entry_points.txt").write_text(
        "[mlinfra.providers]\ncheap = clouds:Cheap\ndear = clouds:Dear\nodd = clouds:Odd\n"
    )
    here = Path(__file__).parent
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", here / "nvml.c"], check=True
    )
    added = [str(folder), str(here)]
    changed = {
        "PYTHONPATH": os.pathsep.join([*added, os.environ.get("PYTHONPATH", "")]),
        "LD_LIBRARY_PATH": str(folder),
        "CLOUDS": json.dumps(plans),
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    sys.path[:0] = added
    targets.installed.cache_clear()
    try:
        yield
    finally:
        del sys.path[: len(added)]
        targets.installed.cache_clear()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
