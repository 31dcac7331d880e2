"""The JupyterLab extension in the real applications."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jupyter_mlinfra import __version__

from .conftest import Browser


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_help_menu_shows_the_version(jupyter: Callable[[str], Browser], app: str) -> None:
    browser = jupyter(app)
    browser.run("about.mjs", NOTEBOOK=browser.save("about", ["1"]), VERSION=__version__)
