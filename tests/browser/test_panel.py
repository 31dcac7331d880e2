"""The side bar and the status bar in a real browser, with real machines."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .conftest import Browser

DETACHED = """\
%%remote detach name=train
import time
from pathlib import Path

print("begun", flush=True)
while not Path("go").exists():
    time.sleep(0.05)
print("ended")"""


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_side_bar(fresh_jupyter: Callable[[str], Browser], app: str) -> None:
    browser = fresh_jupyter(app)
    path = browser.save("panel", ["%load_ext jupyter_mlinfra", DETACHED, "print(6 * 7)"])
    browser.run("panel.mjs", NOTEBOOK=path)


SHOW = """\
import contextlib, io
with contextlib.redirect_stdout(io.StringIO()) as text:
    %remote use
print(*("on: " + row.split()[1] for row in text.getvalue().splitlines() if row[:3] == "on "))"""


def test_where_cells_run_is_chosen(jupyter: Callable[[str], Browser]) -> None:
    browser = jupyter("lab")
    path = browser.save("picker", ["here = 1", SHOW, "there = 2"])
    browser.run("picker.mjs", NOTEBOOK=path, SHOW=SHOW)
