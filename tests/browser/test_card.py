"""The run card: live in the page, static in the saved notebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nbformat
import pytest
from nbconvert import HTMLExporter

from .conftest import Browser

CELLS = [
    "%load_ext jupyter_mlinfra",
    "import numpy as np\n\nsquares = np.arange(100_000) ** 2",
    "%%remote\nimport time\n\ntime.sleep(3)\ntotal = squares.sum()\nprint(total)",
    "%%remote quiet\nprint('no card')",
    "%%remote\nlines = (line for line in ['a', 'b'])\npair = [1, lines]",
    "%%remote\nprint('waiting')\ntime.sleep(60)",
    "%%remote\n1 / 0",
    "%%remote gpu=H100:64\n1",
]
SLEEP, QUIET, WARNING, WAIT, ERROR, IMPOSSIBLE = range(2, 8)


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_card(jupyter: Callable[[str], Browser], app: str) -> None:
    browser = jupyter(app)
    path = browser.save("card", CELLS)
    browser.run("card.mjs", NOTEBOOK=path)

    notebook = nbformat.read(browser.folder / path, as_version=4)
    nbformat.validate(notebook)
    cards = [_card(cell) for cell in notebook.cells]
    assert [index for index, card in enumerate(cards) if card] == [
        *(SLEEP, WARNING, WAIT, ERROR, IMPOSSIBLE)
    ]
    for index, word in [(SLEEP, "Done"), (WAIT, "Interrupted"), (ERROR, "Error")]:
        assert cards[index]["text/plain"].startswith(f"{word} · local · ")
        assert f"<b>{word}</b>" in cards[index]["text/html"]
    assert "⚠ a generator (in 'pair')" in cards[WARNING]["text/plain"]

    page, _ = HTMLExporter().from_notebook_node(notebook)
    (browser.folder / "card.html").write_text(page)
    browser.run("exported.mjs", NOTEBOOK=path, PAGE=str(browser.folder / "card.html"))


def _card(cell: Any) -> Any:
    """The mime bundle of a cell's card, which comes before all other outputs."""
    cards = [
        output for output in cell.get("outputs", ()) if "mlinfra" in output.get("metadata", {})
    ]
    assert cards in ([], cell.get("outputs", [])[:1])
    return cards[0].data if cards else None
