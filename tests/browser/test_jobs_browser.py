"""Detached and background runs in a real browser."""

from __future__ import annotations

import json
from collections.abc import Callable

from .conftest import Browser

DETACHED = """\
%%remote detach name=train
import time
from pathlib import Path

print("begun")
while not Path("go").exists():
    time.sleep(0.05)
answer = 6 * seven
print("ended")"""

BACKGROUND = """\
%%remote async name=side
import time
from pathlib import Path

print("side begun")
while not Path("side").exists():
    time.sleep(0.05)
print("side ended")
total = 1"""

FAILING = """\
%%remote async name=failing
1 / 0"""

BUSY = """\
import time
from pathlib import Path

print("busy")
deadline = time.monotonic() + 60
while not Path("free").exists() and time.monotonic() < deadline:
    time.sleep(0.05)"""


def test_a_saved_card_brings_its_run_back(jupyter: Callable[[str], Browser]) -> None:
    browser = jupyter("lab")
    cells = ["%load_ext jupyter_mlinfra\nseven = 7", DETACHED, "print(answer)"]
    path = browser.save("attach", cells)
    browser.run("jobs.mjs", NOTEBOOK=path, SCENARIO="attach")
    saved = json.loads((browser.folder / path).read_text())
    attached = next(it for it in saved["cells"] if it["source"] == ["%remote attach train"])
    assert "begun\nended\n" in "".join(
        text for output in attached["outputs"] for text in output.get("text", [])
    )


def test_a_background_run_shows_itself_while_other_cells_run(
    jupyter: Callable[[str], Browser],
) -> None:
    browser = jupyter("lab")
    cells = ["%load_ext jupyter_mlinfra", BACKGROUND, BUSY, "print(total)", FAILING]
    path = browser.save("background", cells)
    browser.run("jobs.mjs", NOTEBOOK=path, SCENARIO="background")
