"""The generators that a training run draws from: ``rng="all"`` of a checkpoint's state."""

from __future__ import annotations

import random
import sys
from typing import Any


def get() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's global generators, as far as they are loaded."""
    state: dict[str, Any] = {"python": random.getstate()}
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    if torch is not None:
        state["torch"] = torch.get_rng_state()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def put(state: dict[str, Any]) -> None:
    """Set them; libraries that were loaded then are loaded now."""
    random.setstate(state["python"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(state["numpy"])
    if "torch" in state:
        import torch

        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            devices = state["cuda"][: torch.cuda.device_count()]
            torch.cuda.set_rng_state_all(devices)
