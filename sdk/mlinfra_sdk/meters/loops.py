"""The loops of this process: those of progress bars, of libraries, and of :func:`track`."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

_KEPT = 64
"""Loops that have ended and are still told of."""
TQDM = "tqdm.std"


class Meter(msgspec.Struct, omit_defaults=True):
    """One loop. ``done`` of ``total`` (0: not known) units in ``seconds`` since it began;
    ``source`` says who counts: ``tqdm``, ``track``, or a library (``keras``). ``nested``: another
    loop was under way when it began."""

    key: int
    label: str
    unit: str
    done: float
    total: float
    seconds: float
    source: str
    ended: bool = False
    nested: bool = False

    def __str__(self) -> str:
        """``12/50 it``."""
        of = f"/{self.total:.10g}" if self.total else ""
        return f"{self.done:.10g}{of} {self.unit}"

    @property
    def left(self) -> float | None:
        """Seconds to its end at its mean speed until now; None if that cannot be told."""
        if not 0 < self.done <= self.total:
            return None
        return self.seconds * (self.total - self.done) / self.done


class Tracked:
    """The count of a loop of which we are told: by :func:`track`, or by a library's own calls."""

    def __init__(
        self, label: str, unit: str, total: float, step: float = 1, source: str = "track"
    ) -> None:
        self.label, self.unit, self.total, self.step = label, unit, total, step
        self.source = source
        self.count = 0
        self.began = time.perf_counter()
        self.until: float | None = None
        """When it was told of last; None: it is under way."""

    def at(self, count: int) -> None:
        """So many elements are done. A library may never tell of the loop's end."""
        self.count, self.until = count, time.perf_counter()


class Meters:
    """All loops of this process. Read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0
        self._since = 0
        self._bars: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._tracked: dict[int, Tracked] = {}
        self._open: list[int] = []
        """Keys of the loops that are under way, the outermost first."""
        self._nested: set[int] = set()
        self._ended: dict[int, Meter] = {}

    def read(self) -> list[Meter]:
        """All loops under way, and the last that have ended, in the order of their beginnings."""
        found = dict(self._ended)
        for bar in open_bars():
            meter = self._of_bar(bar)
            if meter is not None:
                found.setdefault(meter.key, meter)
        for key, tracked in list(self._tracked.items()):
            found[key] = self._of_tracked(key, tracked)
        return sorted(
            (meter for meter in found.values() if meter.key > self._since),
            key=lambda meter: meter.key,
        )

    def begin(self) -> None:
        """Another cell begins: what there was before is not told of any more."""
        with self._lock:
            self._since = self._last
            self._ended.clear()
            self._open.clear()
            for key, tracked in list(self._tracked.items()):
                if tracked.source != "track":  # its library never told of the end
                    del self._tracked[key]

    def begun(self, bar: Any) -> None:
        """A bar of tqdm was made."""
        self._key_of(bar)

    def closed(self, bar: Any) -> None:
        """A bar of tqdm comes to its end."""
        meter = self._of_bar(bar)
        if meter is not None:
            self._end(meter)

    def track(self, tracked: Tracked) -> int:
        """A loop begins; gives its key."""
        with self._lock:
            key = self._new_key()
            self._tracked[key] = tracked
        return key

    def tracked_to_end(self, key: int) -> None:
        """It has ended."""
        tracked = self._tracked.pop(key, None)
        if tracked is not None:
            tracked.until = tracked.until or time.perf_counter()
            self._end(self._of_tracked(key, tracked))

    def _end(self, meter: Meter) -> None:
        meter.ended = True
        with self._lock:
            self._ended[meter.key] = meter
            if meter.key in self._open:
                self._open.remove(meter.key)
            while len(self._ended) > _KEPT:
                del self._ended[next(iter(self._ended))]

    def _new_key(self) -> int:
        self._last = key = self._last + 1
        if self._open:
            self._nested.add(key)
        self._open.append(key)
        return key

    def _key_of(self, bar: Any) -> int:
        with self._lock:
            key = self._bars.get(bar)
            if key is None:
                key = self._bars[bar] = self._new_key()
            return key

    def _of_bar(self, bar: Any) -> Meter | None:
        try:
            done, start = float(bar.n - bar.initial), float(bar.start_t)
            unit = f"{bar.unit}".strip() or "it"
            label, total = f"{bar.desc}".strip().rstrip(":"), float(bar.total or 0)
        except (
            AttributeError,
            TypeError,
            ValueError,
        ):  # disabled, or some other bar
            return None
        key = self._key_of(bar)
        seconds = bar._time() - start
        return Meter(key, label, unit, done, total, seconds, "tqdm", nested=key in self._nested)

    def _of_tracked(self, key: int, tracked: Tracked) -> Meter:
        seconds = (tracked.until or time.perf_counter()) - tracked.began
        return Meter(
            key,
            tracked.label,
            tracked.unit,
            tracked.count * tracked.step,
            tracked.total,
            seconds,
            tracked.source,
            nested=key in self._nested,
        )


meters = Meters()
"""Those of this process."""


def track(
    iterable: Iterable[T], samples: float = 1, *, label: str = "", unit: str = ""
) -> Iterator[T]:
    """Go through ``iterable``, counting ``samples`` for each element that has been worked on.

    The count is shown on the run card as a rate, and compared by ``%%compare``. Give the number of
    samples in a batch to have samples per second; ``unit`` names what is counted (default:
    ``samples``, or ``it`` for one each). Costs about a tenth of a microsecond for each element.
    """
    if samples <= 0:
        raise ValueError(f"samples must be above 0, not {samples!r}")
    total = len(iterable) * samples if isinstance(iterable, Sized) else 0
    tracked = Tracked(label, unit or ("it" if samples == 1 else "samples"), total, samples)
    key = meters.track(tracked)
    try:
        for element in iterable:
            yield element
            tracked.count += 1
    finally:
        meters.tracked_to_end(key)


def outermost(found: Iterable[Meter]) -> Meter | None:
    """Of loops in the order of their beginnings, the one under way that is in no other."""
    return next((meter for meter in found if not meter.ended), None)


def open_bars() -> list[Any]:
    """The bars of tqdm that are open, if this process uses it."""
    module = sys.modules.get(TQDM)
    instances = getattr(getattr(module, "tqdm", None), "_instances", None)
    try:
        return list(instances or ())
    except RuntimeError:  # the set changed meanwhile; the next reading is near
        return []
