"""Widgets that live in the remote kernel, in a real browser."""

from __future__ import annotations

from collections.abc import Callable

from .conftest import Browser

SLIDER = """\
%%remote
import time
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt
from tqdm.notebook import tqdm

slider = widgets.IntSlider(3, 0, 50, description="n")
seen = widgets.Label("nothing yet")
slider.observe(lambda change: setattr(seen, "value", f"saw {change.new}"), "value")
widgets.VBox([slider, seen])"""

LOOP = """\
%%remote
deadline = time.monotonic() + 30
while slider.value == 3 and time.monotonic() < deadline:
    time.sleep(0.05)
print("the loop saw", slider.value)"""

HERE = "slider"

LINK = """\
%%remote
a = widgets.IntSlider(1, 0, 50, description="a")
b = widgets.IntSlider(2, 0, 50, description="b")
link = widgets.jslink((a, "value"), (b, "value"))
widgets.HBox([a, b])"""

INTERACT = """\
%%remote
@widgets.interact(k=(0, 50))
def power(k=3):
    print("two to the", k, "is", 2**k)"""

PLOT = """\
%%remote
place = widgets.Output(layout={"border": "1px solid gray"})
display(place)
with place:
    plt.figure(figsize=(3, 1))
    plt.plot([1, 3, 2])
    plt.show()"""

BARS = """\
%%remote
for _ in tqdm(range(2), desc="outer"):
    for _ in tqdm(range(3), desc="inner"):
        time.sleep(0.02)"""

WAIT = """\
%%remote
deadline = time.monotonic() + 60
while not Path("reloaded").exists() and time.monotonic() < deadline:
    time.sleep(0.05)"""


def test_widgets(jupyter: Callable[[str], Browser]) -> None:
    browser = jupyter("lab")
    cells = [SLIDER, LOOP, HERE, LINK, INTERACT, PLOT, BARS, WAIT]
    path = browser.save("widgets", ["%load_ext jupyter_mlinfra", *cells])
    browser.run("widgets.mjs", NOTEBOOK=path)
