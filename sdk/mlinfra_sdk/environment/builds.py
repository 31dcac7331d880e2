"""Packages that have other builds for other accelerators.

Sources, all read on 2026-11-25: PyTorch's builds are chosen by uv's ``--torch-backend``, which
knows PyTorch's own indexes (docs.astral.sh/uv/guides/integration/pytorch); the extras of JAX are
those of docs.jax.dev/en/latest/installation.html, that of TensorFlow is from
tensorflow.org/install/pip.
"""

from __future__ import annotations

import re

from mlinfra_sdk.worker.recipe import Platform

TORCH = "torch"
_EXTRAS_WITH_CUDA = {"jax": "cuda12", "tensorflow": "and-cuda"}
# What belongs to one build: another build brings its own.
_PARTS = ("nvidia-", "cuda-", "triton", "pytorch-triton", "jax-cuda")
_INDEX = re.compile(r"https://download\.pytorch\.org/whl/(cpu|cu\d+|rocm[\d.]+|xpu)/?")
_BUILT = frozenset({TORCH, "torchvision", "torchaudio", *_EXTRAS_WITH_CUDA})


def extras(package: str, platform: Platform) -> list[str]:
    """Extras that make a package use the machine's accelerator."""
    extra = _EXTRAS_WITH_CUDA.get(package)
    return [extra] if extra and platform.cuda else []


def torch_backend(platform: Platform) -> str:
    """What uv is told to choose PyTorch's build by; nothing where there is only one."""
    if platform.markers.get("sys_platform") == "darwin":
        return ""
    return "auto" if platform.cuda else "cpu"


def torch_build(index: str) -> str:
    """The ``--torch-backend`` of one of PyTorch's own indexes; nothing for any other index."""
    match = _INDEX.fullmatch(index)
    return match[1] if match else ""


def is_part(package: str, of: str) -> bool:
    """Whether ``package`` comes with one build of ``of``, so that its version here says nothing."""
    return of in _BUILT and package.startswith(_PARTS)


def public(version: str) -> str:
    """A version without its local part, which names a build: 2.13.0 of 2.13.0+cpu."""
    return version.partition("+")[0]
