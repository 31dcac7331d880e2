"""The notebook that ``./lab`` opens, run in JupyterLab as a new user runs it."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from .conftest import ROOT, Browser


def test_quickstart(jupyter: Callable[[str], Browser]) -> None:
    browser = jupyter("lab")
    shutil.copy(ROOT / "notebooks" / "quickstart.ipynb", browser.folder)
    browser.run("quickstart.mjs", NOTEBOOK="quickstart.ipynb")
