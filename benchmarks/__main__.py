"""Run the benchmarks and write their report: `python -m benchmarks [SUITE ...]`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import platform
import time
from pathlib import Path

from benchmarks.harness import Figure, machine, say

SUITES = (
    "cells",
    "checkpoints",
    "arrays",
    "compression",
    "deltas",
    "environments",
    "link",
    "jupyter",
    "lab",
    "meters",
    "predict",
    "runs",
    "ssh",
    "streaming",
    "transparency",
    "files",
)
ASKED = ("gpu",)
"""Those that only run when they are named: they need what most machines do not have."""
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run the named suites (all by default)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="suite", help=", ".join([*SUITES, *ASKED]))
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the report")
    arguments = parser.parse_args()
    suites = arguments.suites or list(SUITES)
    if unknown := set(suites) - {*SUITES, *ASKED}:
        parser.error(f"no such suite: {', '.join(sorted(unknown))}")
    facts = machine()
    start = time.monotonic()
    figures = {suite: importlib.import_module(f"benchmarks.{suite}").main() for suite in suites}
    say(f"{time.monotonic() - start:.0f} s")
    name = f"{time.strftime('%Y-%m-%d')}-{platform.node() or 'machine'}"
    report = render(facts, figures)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / f"{name}.md").write_text(report)
    record = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": facts,
        "figures": {
            suite: [dataclasses.asdict(figure) | {"ratio": figure.ratio} for figure in found]
            for suite, found in figures.items()
        },
    }
    (arguments.output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(report)


def render(facts: dict[str, str], figures: dict[str, list[Figure]]) -> str:
    """The report in Markdown."""
    lines = [f"# Benchmarks, {time.strftime('%Y-%m-%d %H:%M %Z')}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for suite, found in figures.items():
        lines += [
            "",
            f"## {suite}",
            "",
            "| what | ours | peers, same run | ours : peer | goal | met | how |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *map(_row, found),
        ]
    return "\n".join(lines) + "\n"


def _row(figure: Figure) -> str:
    peers = ", ".join(
        f"{name} {_number(value)} {figure.unit}" for name, value in figure.peers.items()
    )
    ratios = ", ".join(f"{figure.ours / value:.2f}" for value in figure.peers.values() if value)
    met = {None: "", True: "yes", False: "**no**"}[figure.met]
    ours = f"{_number(figure.ours)} {figure.unit}"
    cells = (figure.what, ours, peers, ratios, figure.goal, met, figure.note)
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
