"""Which checkpoints are kept."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from mlinfra_sdk import units
from mlinfra_sdk.checkpoints.manifest import Manifest
from mlinfra_sdk.errors import RequestError


class Keep(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint stays if any of these rules wants it.

    ``last``: the newest so many. ``best``: the name of a metric, of which the ``best_count`` best
    stay (``mode`` is ``min`` or ``max``). ``every``: the first of each such span of time, a
    duration such as ``6h``.
    """

    last: int = 3
    best: str = ""
    mode: str = "min"
    best_count: int = 1
    every: str = ""

    def __post_init__(self) -> None:
        if self.last < 1 or self.best_count < 1:
            raise RequestError(f"Keep(last={self.last}) keeps nothing.", hint="Use 1 or more.")
        if self.mode not in ("min", "max"):
            raise RequestError(
                f"Keep(mode={self.mode!r}) is not understood.", hint="Use 'min' or 'max'."
            )
        if self.every:
            try:
                valid = units.parse_duration(self.every) > 0
            except ValueError:
                valid = False
            if not valid:
                raise RequestError(
                    f"Keep(every={self.every!r}) is no duration.", hint="Write '6h', or '30m'."
                )

    def doomed(self, manifests: Sequence[Manifest]) -> list[Manifest]:
        """Those that no rule wants; ``manifests`` come oldest first."""
        wanted = {_key(it) for it in manifests[-self.last :]}
        if self.best:
            measured = [it for it in manifests if self.best in it.metrics]
            measured.sort(key=lambda it: it.metrics[self.best], reverse=self.mode == "max")
            wanted |= {_key(it) for it in measured[: self.best_count]}
        if self.every:
            span = units.parse_duration(self.every)
            first: dict[int, tuple[int, str]] = {}
            for it in manifests:
                first.setdefault(int(it.created // span), _key(it))
            wanted |= set(first.values())
        return [it for it in manifests if _key(it) not in wanted]


def _key(manifest: Manifest) -> tuple[int, str]:
    """Two machines may have made one number."""
    return manifest.number, manifest.id
