"""How many cells show what they show in a local run: `python -m benchmarks transparency`.

The notebooks and the comparison are those of the tests (tests/integration/transparency.py).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import anyio

from benchmarks.harness import START_PEER, STOP_PEER, Figure, say
from tests.integration.transparency import MLINFRA, NAMES, Shares, Tool, verdicts

PX = Tool("%%px", START_PEER, STOP_PEER)
GOAL = 99.0


def main() -> list[Figure]:
    """All figures of this module."""
    shares = {"ours": Shares(), "%%px": Shares()}
    for name in NAMES:
        for who, tool in (("ours", MLINFRA), ("%%px", PX)):
            with tempfile.TemporaryDirectory() as directory:
                shares[who].add(anyio.run(verdicts, name, Path(directory), tool))
        say(f"{name}\n{shares['ours']}\n%%px\n{shares['%%px']}")
    ours, peer = shares["ours"], shares["%%px"]
    return [
        Figure(
            f"cells whose outputs equal those of a local run: {way}",
            ours.percent(way),
            "%",
            {"%%px, 1 engine": peer.percent(way)},
            f">= {GOAL:.0f} %",
            ours.percent(way) >= GOAL,
            f"{ours.equal[way]} of {total} cells, every message compared; "
            f"%%px {peer.equal[way]} of {peer.total[way]}",
        )
        for way, total in ours.total.items()
    ]
