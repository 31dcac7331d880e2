"""Where libraries that train call their callbacks, and what is counted there.

Each patch wraps a method or function that the library calls once for each step or round. Nothing is
added to the user's callbacks, nothing of a model is touched, and an error in here is nobody's but
ours. Libraries that show a bar of tqdm are counted by it alone.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .loops import Tracked, meters

logger = logging.getLogger(__name__)

_loops: weakref.WeakKeyDictionary[Any, dict[str, _Loop]] = weakref.WeakKeyDictionary()
"""The loops under way, by the object of the library that runs them."""


class _Loop(Tracked):
    """A loop that a library tells of."""

    def __init__(self, source: str, unit: str, total: float = 0) -> None:
        super().__init__(source, unit, total, source=source)
        self.base = 0
        """Steps of the epochs before."""
        self.key = meters.track(self)

    def end(self) -> None:
        meters.tracked_to_end(self.key)


def _after(owner: Any, name: str, hook: Callable[..., None]) -> None:
    """Have a hook called after a method, with the same arguments."""
    original = owner.__dict__[name]

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        try:
            hook(*args, **kwargs)
        except Exception:  # the training must not suffer from it
            logger.debug("A loop is not counted", exc_info=True)
        return result

    setattr(owner, name, method)


def _before(owner: Any, name: str, hook: Callable[..., None]) -> None:
    """Have a hook called before a method, with the same arguments."""
    original = owner.__dict__[name]

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        try:
            hook(*args, **kwargs)
        except Exception:
            logger.debug("A loop is not counted", exc_info=True)
        return original(*args, **kwargs)

    setattr(owner, name, method)


def _training(owner: Any, source: str, epochs: float = 0, steps: float = 0) -> None:
    """A training begins, of so many epochs and steps in all (0: not known)."""
    _loops[owner] = {
        "epoch": _Loop(source, "epoch", epochs),
        "step": _Loop(source, "step", steps),
    }


def _end(owner: Any) -> None:
    for loop in _loops.pop(owner, {}).values():
        loop.end()


# -- Keras -----------------------------------------------------------------------------------------


def _keras(module: ModuleType) -> None:
    callbacks: Any = module.__dict__["CallbackList"]

    def begin(self: Any, logs: Any = None) -> None:
        params = self.params or {}
        epochs, steps = params.get("epochs") or 0, params.get("steps") or 0
        _training(self, "keras", epochs, epochs * steps)

    def batch(self: Any, batch: int, logs: Any = None) -> None:
        loop = _loops[self]["step"]
        loop.at(loop.base + int(batch) + 1)  # of several steps in one call, the last is told

    def epoch(self: Any, epoch: int, logs: Any = None) -> None:
        loops = _loops[self]
        loops["step"].base = loops["step"].count
        loops["epoch"].at(loops["epoch"].count + 1)

    _before(callbacks, "on_train_begin", begin)
    _after(callbacks, "on_train_batch_end", batch)
    _after(callbacks, "on_epoch_end", epoch)
    _after(callbacks, "on_train_end", lambda self, logs=None: _end(self))


# -- Lightning -------------------------------------------------------------------------------------


def _lightning(module: ModuleType) -> None:
    def called(trainer: Any, hook: str, *args: Any, **kwargs: Any) -> None:
        if hook == "on_train_start":
            bar = trainer.progress_bar_callback
            if "TQDM" in type(bar).__name__ and bar.is_enabled:
                return
            epochs = max(0, trainer.max_epochs or 0)
            steps = epochs * trainer.num_training_batches
            _training(trainer, "lightning", epochs, steps if steps < float("inf") else 0)
        elif trainer in _loops:
            loops = _loops[trainer]
            if hook == "on_train_batch_end":
                loops["step"].at(loops["step"].count + 1)
            elif hook == "on_train_epoch_start":
                loops["epoch"].at(trainer.current_epoch)
            elif hook == "on_train_end":
                loops["epoch"].at(loops["epoch"].count + 1)
                _end(trainer)

    _before(module, "_call_callback_hooks", called)


# -- Hugging Face ----------------------------------------------------------------------------------


def _transformers(module: ModuleType) -> None:
    handler: Any = module.__dict__["CallbackHandler"]
    with_tqdm: Any = module.__dict__["ProgressCallback"]

    def begin(self: Any, args: Any, state: Any, control: Any) -> None:
        if not any(isinstance(it, with_tqdm) for it in self.callbacks):
            _training(self, "transformers", state.num_train_epochs, state.max_steps)

    def step(self: Any, args: Any, state: Any, control: Any) -> None:
        if self in _loops:
            _loops[self]["step"].at(state.global_step)

    def epoch(self: Any, args: Any, state: Any, control: Any) -> None:
        if self in _loops:
            _loops[self]["epoch"].at(round(state.epoch))

    _before(handler, "on_train_begin", begin)
    _after(handler, "on_step_end", step)
    _after(handler, "on_epoch_end", epoch)
    _after(handler, "on_train_end", lambda self, *args: _end(self))


# -- fastai ----------------------------------------------------------------------------------------


def _fastprogress(module: ModuleType) -> None:
    bar: Any = module.__dict__["ProgressBar"]

    def update(self: Any, value: int) -> None:
        if self not in _loops or value == 0:
            unit = "epoch" if self.master is not None and self.parent is None else "step"
            _loops[self] = {unit: _Loop("fastprogress", unit, self.total or 0)}
        (loop,) = _loops[self].values()
        if value:
            loop.at(int(value))
        if self.total and value >= self.total:
            _end(self)

    _after(bar, "update", update)


# -- boosting --------------------------------------------------------------------------------------


def _xgboost(module: ModuleType) -> None:
    container: Any = module.__dict__["CallbackContainer"]

    def begin(self: Any, model: Any) -> None:
        _loops[self] = {"round": _Loop("xgboost", "round")}

    def iteration(self: Any, *args: Any, **kwargs: Any) -> None:
        loop = _loops[self]["round"]
        loop.at(loop.count + 1)

    _before(container, "before_training", begin)
    _after(container, "after_iteration", iteration)
    _after(container, "after_training", lambda self, model: _end(self))


def _lightgbm(module: ModuleType) -> None:
    booster: Any = module.__dict__["Booster"]

    original = booster.update

    @functools.wraps(original)
    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Rounds may take less than a millisecond, so this looks its loop up once.
        loop = _round_of(self)
        result = original(self, *args, **kwargs)
        if loop is not None:
            loop.at(loop.count + 1)
        return result

    # It has no word for the end: what has not gone on is of the time until its last round.
    booster.update = update


def _round_of(booster: Any) -> _Loop | None:
    try:
        loops = _loops.get(booster)
        if loops is None:
            loops = _loops[booster] = {"round": _Loop("lightgbm", "round")}
        return loops["round"]
    except Exception:
        logger.debug("A loop is not counted", exc_info=True)
        return None


LIBRARIES: dict[str, Callable[[ModuleType], None]] = {
    "keras.src.callbacks.callback_list": _keras,
    "pytorch_lightning.trainer.call": _lightning,
    "lightning.pytorch.trainer.call": _lightning,
    "transformers.trainer_callback": _transformers,
    "fastprogress.fastprogress": _fastprogress,
    "xgboost.callback": _xgboost,
    "lightgbm.basic": _lightgbm,
}
"""Modules to be patched, and by what."""
