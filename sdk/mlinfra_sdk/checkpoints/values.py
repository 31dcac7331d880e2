"""How the entries of a state are captured, and restored in place.

Whatever the training code holds (models, optimizers, arrays, lists) stays the same object, so that
references to it from elsewhere stay right. Only what cannot change in place, such as a number, is
replaced in the mapping that was given as the state.
"""

from __future__ import annotations

import random
import sys
from collections.abc import MutableMapping
from typing import Any

from mlinfra_sdk.checkpoints import random_state
from mlinfra_sdk.errors import CheckpointError

RNG = "rng"
"""The entry that stands for random generators, when its value is ``"all"``."""

_CONTAINERS = (dict, list, tuple)
_ATOMS = frozenset((int, float, complex, bool, str, bytes, type(None)))


def captured(name: str, value: Any) -> tuple[str, Any]:
    """What to pickle of an entry, and of which kind that is. Nothing is copied yet."""
    if name == RNG and value == "all":
        return "rng", random_state.get()
    kind = kind_of(value)
    match kind:
        case "tree":
            items = value.items() if isinstance(value, dict) else enumerate(value)
            return kind, [(key, captured("", item)) for key, item in items]
        case "module":
            return kind, _module_state(value)
        case "stateful":
            return kind, value.state_dict()
        case "generator":
            return kind, value.get_state()
        case "bits":
            return kind, value.bit_generator.state
        case "legacy":
            return kind, value.get_state()
        case "random":
            return kind, value.getstate()
        case "xgboost":
            return kind, bytes(value.__getstate__()["handle"])
        case "lightgbm":
            return kind, value.model_to_string(num_iteration=-1)
        case "keras":
            return kind, _keras_state(value)
    return kind, value


def kind_of(value: Any) -> str:
    """The way in which a value is saved and restored."""
    if type(value) in _CONTAINERS:
        items = value.values() if isinstance(value, dict) else value
        return "tree" if any(kind_of(item) not in ("value", "array") for item in items) else "value"
    loaded = sys.modules.get
    torch, numpy = loaded("torch"), loaded("numpy")
    # First: with Keras' torch backend it is a module too, whose keys count the models of a process.
    if (keras := loaded("keras")) is not None and isinstance(value, keras.Model):
        return "keras"
    if torch is not None:
        if isinstance(value, torch.nn.Module):
            return "module"
        if isinstance(value, torch.Tensor):
            return "tensor"
        if isinstance(value, torch.Generator):
            return "generator"
    if numpy is not None:
        if isinstance(value, numpy.ndarray):
            return "array"
        if isinstance(value, numpy.random.Generator):
            return "bits"
        if isinstance(value, numpy.random.RandomState):
            return "legacy"
    if (xgboost := loaded("xgboost")) is not None and isinstance(value, xgboost.Booster):
        return "xgboost"
    if (lightgbm := loaded("lightgbm")) is not None and isinstance(value, lightgbm.Booster):
        return "lightgbm"
    if isinstance(value, random.Random):
        return "random"
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return "stateful"
    return "value"


def restored(name: str, kind: str, saved: Any, live: Any) -> Any:
    """Put what was saved into ``live``, the entry's present value; gives that, or what is to
    replace it. Raises :class:`CheckpointError` if it does not fit."""
    if kind == "rng":
        random_state.put(saved)
        return live
    now = kind_of(live)
    if {kind, now} & _OWN and kind != now:
        raise CheckpointError(
            f"{name!r} was saved as another kind of object than {type(live).__name__}.",
            hint="Use another name for these checkpoints, or resume=False.",
        )
    try:
        match kind:
            case "tree":
                return _restore_tree(name, saved, live)
            case "module":
                _restore_module(saved, live)
            case "stateful":
                live.load_state_dict(saved)
            case "generator" | "legacy":
                live.set_state(saved)
            case "bits":
                live.bit_generator.state = saved
            case "random":
                live.setstate(saved)
            case "xgboost":
                return _restore_xgboost(saved, live)
            case "lightgbm":  # one that trains cannot be set back: see docs/checkpoints.md
                return sys.modules["lightgbm"].Booster(model_str=saved)
            case "keras":
                _restore_keras(saved, live)
            case _:
                return in_place(saved, live)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{name!r} of the checkpoint does not fit the present one: {error}",
            hint="It has changed since; use another name for these checkpoints, or resume=False.",
        ) from error
    return live


_OWN = frozenset(("module", "stateful", "generator", "legacy", "bits", "random", "keras"))


def in_place(new: Any, live: Any, seen: dict[int, Any] | None = None) -> Any:
    """Make ``live`` equal to ``new`` if it can be changed; gives it, else ``new``. ``seen`` holds
    what stands for each part of ``new`` that has been met: graphs may have cycles."""
    seen = {} if seen is None else seen
    if id(new) in seen:
        return seen[id(new)]
    if type(new) not in _ATOMS:
        seen[id(new)] = new
        seen[id(new)] = _in_place(new, live, seen)
        return seen[id(new)]
    return new


def _in_place(new: Any, live: Any, seen: dict[int, Any]) -> Any:
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if type(new) is not type(live) and type(new).__qualname__ != type(live).__qualname__:
        return new
    if torch is not None and isinstance(live, torch.Tensor):
        if live.shape == new.shape and live.dtype == new.dtype:
            with torch.no_grad():
                live.copy_(new)
            return live
        return new
    if numpy is not None and isinstance(live, numpy.ndarray):
        if (live.shape, live.dtype, live.flags.writeable) == (new.shape, new.dtype, True):
            live[...] = new
            return live
        return new.copy() if new.flags.writeable else new
    if isinstance(live, list):
        seen[id(new)] = live
        olds = [*live, *[None] * (len(new) - len(live))]
        live[:] = [in_place(it, old, seen) for it, old in zip(new, olds, strict=False)]
        return live
    if isinstance(live, dict):
        seen[id(new)] = live
        merged = {key: in_place(it, live.get(key), seen) for key, it in new.items()}
        live.clear()
        live.update(merged)
        return live
    if isinstance(live, set):
        live.clear()
        live.update(new)
        return live
    if isinstance(live, bytearray):
        live[:] = new
        return live
    return _object_in_place(new, live, seen)


def _object_in_place(new: Any, live: Any, seen: dict[int, Any]) -> Any:
    """An ordinary object gets the attributes; one with memory of its own is replaced."""
    if type(live).__module__ == "builtins" or not hasattr(live, "__dict__"):
        return new
    if isinstance(live, type) or getattr(type(live), "__reduce_ex__") != object.__reduce_ex__:  # noqa: B009
        return new
    if hasattr(live, "__setstate__") and not hasattr(live, "get_params"):
        return new
    seen[id(new)] = live
    in_place(vars(new), vars(live), seen)
    return live


def _restore_tree(name: str, saved: Any, live: Any) -> Any:
    old = dict(live.items() if isinstance(live, dict) else enumerate(live))
    new = {
        key: restored(f"{name}[{key!r}]", kind, value, old.get(key)) for key, (kind, value) in saved
    }
    if isinstance(live, dict):
        live.clear()
        live.update(new)
        return live
    if isinstance(live, list):
        live[:] = new.values()
        return live
    return tuple(new.values())


def _module_state(module: Any) -> dict[str, Any]:
    """Also what ``state_dict`` leaves out: buffers that are not persistent, and who trains."""
    state = module.state_dict()
    return {
        "state": state,
        "buffers": {name: it for name, it in module.named_buffers() if name not in state},
        "training": {name: it.training for name, it in module.named_modules()},
        "frozen": [name for name, it in module.named_parameters() if not it.requires_grad],
    }


def _restore_module(saved: dict[str, Any], module: Any) -> None:
    module.load_state_dict(saved["state"])
    torch = sys.modules["torch"]
    buffers = dict(module.named_buffers())
    with torch.no_grad():
        for name, value in saved["buffers"].items():
            if name in buffers:
                buffers[name].copy_(value)
    for name, it in module.named_modules():
        it.training = saved["training"].get(name, it.training)
    for name, it in module.named_parameters():
        it.requires_grad_(name not in saved["frozen"])


def _restore_xgboost(saved: bytes, live: Any) -> Any:
    """Model, attributes and parameters, as xgboost itself pickles them."""
    kind = sys.modules["xgboost"].Booster
    booster = kind.__new__(kind)
    booster.__setstate__({"handle": bytearray(saved)})
    if not isinstance(live, kind):
        return booster
    live.handle, booster.handle = booster.handle, live.handle  # the old one ends with its owner
    return live


def _keras_state(model: Any) -> dict[str, Any]:
    optimizer = getattr(model, "optimizer", None)
    variables = optimizer.variables if optimizer is not None else []
    return {
        "model": [sys.modules["keras"].ops.convert_to_numpy(it) for it in model.variables],
        "optimizer": [sys.modules["keras"].ops.convert_to_numpy(it) for it in variables],
    }


def _restore_keras(saved: dict[str, Any], model: Any) -> None:
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and saved["optimizer"]:
        optimizer.build(model.trainable_variables)
    pairs = [(model.variables, saved["model"])]
    if optimizer is not None:
        pairs.append((optimizer.variables, saved["optimizer"]))
    for variables, values in pairs:
        if len(variables) != len(values):
            raise ValueError(f"{len(values)} variables were saved, there are {len(variables)}")
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


def put_back(key: str, new: Any, state: Any) -> None:
    """Bind what could not be changed in place."""
    if state[key] is new:
        return
    if not isinstance(state, MutableMapping):
        raise CheckpointError(
            f"{key!r} cannot be restored: a {type(state).__name__} cannot be changed.",
            hint="Give the state as a dict.",
        )
    state[key] = new
