"""What an environment of its own adds to a machine's start: `python -m benchmarks environments`.

uv's cache is the user's own, so that what is measured is making an environment, not a network.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Figure, median, say
from mlinfra_sdk import Session
from mlinfra_sdk.frontend import Console

ROUNDS = 3
CODE = "import sortedcontainers"
GOAL = 1.0
"""Seconds that a cached environment may add."""


def main() -> list[Figure]:
    """All figures of this module."""
    with tempfile.TemporaryDirectory(prefix="mlinfra-bench-") as home:
        before = os.environ.get("MLINFRA_HOME")
        os.environ["MLINFRA_HOME"] = home
        try:
            _start("mirror")  # uv's cache and this process are warm from now on
            seconds: dict[str, list[float]] = {"bare": [], "made": [], "cached": []}
            for _ in range(ROUNDS):
                _forget(Path(home))
                for name, env in (("bare", "none"), ("made", "mirror"), ("cached", "mirror")):
                    say(f"start to first output: {name}")
                    seconds[name].append(_start(env))
        finally:
            del os.environ["MLINFRA_HOME"]
            if before is not None:
                os.environ["MLINFRA_HOME"] = before
    bare, made, cached = (median(seconds[name]) for name in ("bare", "made", "cached"))
    note = f"median of {ROUNDS}; bare {bare:.2f} s"
    return [
        Figure("a machine's start, environment made", made, "s", note=note),
        Figure("a machine's start, environment cached", cached, "s", note=note),
        Figure(
            "a cached environment adds",
            cached - bare,
            "s",
            goal=f"<= {GOAL:g} s",
            met=cached - bare <= GOAL,
            note=note,
        ),
    ]


def _start(env: str) -> float:
    """Seconds from the first run of a session to its end."""
    with Session(namespace={}, on="local", isolate=True, env=env, sync=False) as session:
        began = time.perf_counter()
        session.run(CODE, frontend=Console())
        return time.perf_counter() - began


def _forget(home: Path) -> None:
    """Remove what is cached, in one step as its owner would."""
    cached = home / "cache" / "environments"
    cached.rename(home / f"gone-{time.monotonic_ns()}")
