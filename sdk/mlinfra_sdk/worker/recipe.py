"""What an environment is to be made of, as client and agent tell each other."""

from __future__ import annotations

import msgspec
from blake3 import blake3

WHEELS = "{wheels}"
"""In a requirement's URL: the folder in which the machine lays the recipe's wheels."""


class Wheel(msgspec.Struct, frozen=True, array_like=True):
    """A wheel that travels through the chunk store, as the chunks that it consists of."""

    file: str
    digests: list[bytes]


class Recipe(msgspec.Struct, frozen=True, omit_defaults=True):
    """The packages of an environment.

    ``overrides`` are exact versions that hold for whatever package is needed, by whomever;
    ``python`` is a minor version such as ``3.11``.
    """

    python: str
    requirements: list[str] = []
    overrides: list[str] = []
    constraints: list[str] = []
    wheels: list[Wheel] = []
    torch: str = ""
    """Which builds of PyTorch: a ``--torch-backend`` of uv."""
    wheels_only: bool = False
    """All that is needed is among the wheels: no index is asked."""

    @property
    def key(self) -> str:
        """Names the environment: the same recipe gives the same one."""
        return blake3(msgspec.msgpack.encode(self)).hexdigest()[:32]


class Platform(msgspec.Struct, frozen=True, omit_defaults=True):
    """What decides which packages fit a machine.

    ``markers`` are those of PEP 508, ``tags`` its platform tags for wheels, best first, ``cuda``
    the highest version of CUDA that its driver has (empty: no NVIDIA GPU).
    """

    markers: dict[str, str]
    tags: list[str] = []
    cuda: str = ""


class Prepared(msgspec.Struct, frozen=True, omit_defaults=True):
    """An environment that is ready for kernels, and what had to be installed for it."""

    key: str
    installed: dict[str, str]
    """Name and version of every package in it."""
    added: list[str] = []
