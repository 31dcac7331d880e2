"""Whether both sides can exchange objects at all: known before the first run, not after it."""

from __future__ import annotations

from mlinfra_sdk.errors import VersionMismatch
from mlinfra_sdk.worker.messages import AgentInfo
from mlinfra_sdk.worker.versions import versions


def check(machine: str, info: AgentInfo, *, only_sdk: bool = False) -> None:
    """Raise :class:`VersionMismatch` where objects of one side would break on the other: code
    travels as bytecode, which belongs to one minor version of Python. ``only_sdk``: kernels have
    an environment of their own, in which all the rest fits."""
    here = versions()
    digits = {"Python": 2, "cloudpickle": 1, "mlinfra-sdk": 3}
    for what, there in info.versions.items():
        if only_sdk and what != "mlinfra-sdk":
            continue
        count = digits.get(what, 0)
        if here[what].split(".")[:count] != there.split(".")[:count]:
            raise VersionMismatch(
                f"The machine {machine} has {what} {there}, this process {here[what]}: functions "
                "and objects could not travel between them.",
                hint=f"Use the same version on both sides ({what} {here[what]} over there), "
                "or env=mirror.",
            )
