"""Whether a machine really has the accelerators that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from mlinfra_sdk.catalog import Device, Gpu, Gpus, catalog, describe_devices
from mlinfra_sdk.errors import WrongGpu
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.machines.lifecycle import LiveMachine
from mlinfra_sdk.worker import messages as m


def checked(
    machine: LiveMachine, wanted: Gpus | None, client: AgentClient, say: Callable[[str], None]
) -> LiveMachine:
    """The machine with what it really has, as its driver tells. Another one of the alternatives
    than was offered is said; raises :class:`WrongGpu` if it has none of them."""
    if wanted is None:
        return machine
    devices = client.ask(m.Accelerators(client.next_id()), list[Device])
    offered = machine.offer.gpu
    if not devices and offered is not None and _without_nvml(offered):
        say(f"That the machine has {offered} cannot be checked: only NVIDIA's driver is asked.")
        return machine
    given = judge(machine.name, wanted, offered, devices)
    meant = wanted.rank(offered) if offered is not None else None
    if meant is not None and wanted.rank(given) != meant:
        say(f"The machine has {given} instead of {offered}, which gpu={wanted} allows.")
    return replace(machine, offer=msgspec.structs.replace(machine.offer, gpu=given))


def judge(name: str, wanted: Gpus, offered: Gpu | None, devices: Sequence[Device]) -> Gpu:
    """What a machine with these devices has of what is wanted, what was offered first."""
    first = [wish for wish in wanted.alternatives if offered is not None and wish.met_by(offered)]
    given = Gpus((*first, *wanted.alternatives)).found_in(devices)
    if given is None:
        have = describe_devices(devices) or "no NVIDIA GPU that its driver knows of"
        raise WrongGpu(
            f"gpu={wanted} was asked for, but the machine {name} has {have}.",
            hint="Ask another provider by on=, or allow what it has: gpu=A10|L4.",
        )
    return given


def _without_nvml(gpu: Gpu) -> bool:
    parts = catalog().parts_of(gpu.name)
    return bool(parts) and all(catalog().parts[part].vendor != "NVIDIA" for part in parts)
