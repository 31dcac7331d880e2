"""What the JupyterLab extension adds: `python -m benchmarks lab`.

The size of its bundle; the time until JupyterLab is restored with it and without it, interleaved,
in a fresh browser each time; and the list of a thousand runs. Needs Chromium, and the extension
built.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from browser.conftest import CHROMIUM, Browser, start_server

from benchmarks.harness import Figure, median, say
from mlinfra_sdk.ledger import Ledger, Price

ROOT = Path(__file__).parents[1]
ROUNDS = 7
RUNS = 1000
KIB = 300
MS = 100
FRAME_MS = 100
PLUGINS = [f"jupyter-mlinfra:{name}" for name in ("about", "api", "notebook", "panel", "runs")]


def main() -> list[Figure]:
    """All figures of this module."""
    built = ROOT / "jupyter_mlinfra" / "labextension" / "static"
    size = sum(path.stat().st_size for path in built.glob("*.js")) / 1024
    figures = [Figure("bundle, not compressed", size, "KiB", {}, f"<= {KIB}", size <= KIB)]
    with tempfile.TemporaryDirectory(prefix="mlinfra-bench-") as name:
        home = Path(name)
        _fill(home / "mlinfra")
        browser, server = start_server("lab", home)
        try:
            say("loads of JupyterLab")
            return [*figures, *_loads(browser, home), *_list(browser)]
        finally:
            server.terminate()
            server.wait(30)


def _fill(home: Path) -> None:
    home.mkdir(mode=0o700)
    ledger = Ledger.open(home / "ledger.sqlite")
    price = Price(1_100_000, "https://example.org/prices", "2026-11-26")
    machine = ledger.intend_machine(name="box", provider="local", price=price, at=1.79e9)
    ledger.machine_started(machine, at=1.79e9)
    for number in range(RUNS):
        run = ledger.open_run(machine, kind="cell", notebook="a.ipynb", at=1.79e9 + 60 * number)
        ledger.close_run(run, status="done", seconds=30.0)
    ledger.machine_stopped(machine, reason="the end", at=1.79e9 + 60 * RUNS)
    ledger.close()


def _load(browser: Browser, **environment: str) -> dict[str, float]:
    done = subprocess.run(
        [Path(sys.prefix) / "bin" / "node", Path(__file__).with_name("lab.mjs")],
        env=os.environ
        | {"URL": browser.url, "TOKEN": browser.token, "CHROMIUM": CHROMIUM}
        | environment,
        capture_output=True,
        check=True,
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def _loads(browser: Browser, home: Path) -> list[Figure]:
    """With the extension and without it, in turns; the server reads this file for each page."""
    config = home / "config" / "labconfig" / "page_config.json"
    page = json.loads(config.read_text())
    without = page["disabledExtensions"] | {"jupyter-mlinfra": True} | dict.fromkeys(PLUGINS, True)
    times: dict[bool, list[float]] = {True: [], False: []}
    _load(browser)  # the server's own caches
    for _ in range(ROUNDS):
        for enabled in (False, True):
            off = page["disabledExtensions"] if enabled else without
            config.write_text(json.dumps(page | {"disabledExtensions": off}))
            times[enabled].append(_load(browser)["loaded"])
    config.write_text(json.dumps(page))
    plain, ours = median(times[False]), median(times[True])
    added = ours - plain
    note = f"medians of {ROUNDS}; best {min(times[False]):.0f} and {min(times[True]):.0f} ms"
    return [
        Figure("until JupyterLab is restored", ours, "ms", {"without us": plain}, note=note),
        Figure("what of it is ours", added, "ms", {}, f"<= {MS}", added <= MS),
    ]


def _list(browser: Browser) -> list[Figure]:
    found = _load(browser, PANEL="1")
    longest = found["longest"]
    return [
        Figure("side bar opened, first runs listed", found["opened"], "ms"),
        Figure(
            f"longest frame while {found['rows']:.0f} runs are scrolled through",
            longest,
            "ms",
            {},
            f"<= {FRAME_MS}",
            longest <= FRAME_MS,
        ),
    ]
