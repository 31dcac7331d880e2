"""Outputs of remote cells in a real browser; the same script checks them run locally."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from .conftest import Browser

KERNEL = "import os\nprint(os.getpid())"

PLOT = """\
import matplotlib.pyplot as plt
plt.rcParams["figure.figsize"] = 4, 2
plt.plot([n**2 for n in range(10)]);"""

TABLE = """\
import pandas as pd
pd.DataFrame({"square": [0, 1]}).assign(n=[1, 2])"""

BAR = """\
from tqdm.notebook import tqdm
for step in tqdm(range(20), desc="work"):
    pass"""

SLIDER = """\
import os
import ipywidgets as widgets

slider = widgets.IntSlider(3, 0, 50, description="n")
label = widgets.Label(layout={"width": "auto"})
log = widgets.Output()

def show(change):
    label.value = f"{change.new} squared is {change.new**2} in process {os.getpid()}"
    with log:
        print("moved to", change.new)

slider.observe(show, "value")
widgets.VBox([slider, label, log])"""

ERROR = "1 / 0"


@pytest.mark.parametrize(
    ("app", "mode"), [("lab", "local"), ("lab", "remote"), ("notebook", "remote")]
)
def test_outputs(jupyter: Callable[[str], Browser], app: str, mode: str) -> None:
    browser = jupyter(app)
    magic = "%%remote\n" if mode == "remote" else ""
    cells = [magic + cell for cell in (PLOT, TABLE, BAR, SLIDER, ERROR, "print('not reached')")]
    path = browser.save(mode, ["%load_ext jupyter_mlinfra" if magic else "", KERNEL, *cells])
    browser.run("outputs.mjs", NOTEBOOK=path, MODE=mode)
    saved = json.loads((browser.folder / path).read_text())
    outputs = [output for cell in saved["cells"] for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
