"""The oldest JupyterLab and Notebook that are supported, in a real browser."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .conftest import Browser
from .test_panel import DETACHED


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_side_bar(fresh_jupyter: Callable[..., Browser], oldest: str, app: str) -> None:
    browser = fresh_jupyter(app, oldest)
    path = browser.save("panel", ["%load_ext jupyter_mlinfra", DETACHED, "print(6 * 7)"])
    browser.run("panel.mjs", NOTEBOOK=path, VERSION="oldest")
