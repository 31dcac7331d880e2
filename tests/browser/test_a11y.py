"""What is ours in JupyterLab, for those who see little or use no mouse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .conftest import Browser

DETACHED = """\
%%remote detach name=train
import time

print("begun", flush=True)
time.sleep(600)"""


def test_axe_and_keyboard(fresh_jupyter: Callable[[str], Browser], tmp_path: Path) -> None:
    browser = fresh_jupyter("lab")
    path = browser.save("a11y", ["%load_ext jupyter_mlinfra", DETACHED, "%%remote\nprint(6 * 7)"])
    config = tmp_path / "user" / "mlinfra" / "config.toml"
    browser.run("a11y.mjs", NOTEBOOK=path, CONFIG=str(config))
