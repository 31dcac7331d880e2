"""The side bar and the status bar in a real browser, with real machines."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import until

from .conftest import Browser, start_server

DETACHED = """\
%%remote detach name=train
import time
from pathlib import Path
import mlinfra_sdk

print("begun", flush=True)
for epoch in mlinfra_sdk.track(range(3), label="epochs"):
    while epoch == 1 and not Path("go").exists():
        time.sleep(0.05)
print("ended")"""


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_side_bar(fresh_jupyter: Callable[[str], Browser], app: str) -> None:
    browser = fresh_jupyter(app)
    path = browser.save("panel", ["%load_ext jupyter_mlinfra", DETACHED, "print(6 * 7)"])
    browser.run("panel.mjs", NOTEBOOK=path)


def test_the_side_bar_outlives_its_server(tmp_path: Path) -> None:
    """What is shown while there is none is no claim, and right when there is one again."""
    browser, server = start_server("lab", tmp_path)
    ended, wanted = browser.folder / "ended", browser.folder / "wanted"
    servers = [server]

    def restart() -> None:
        until(wanted.exists, "the page to have seen the machine", patience=120)
        server.kill()
        server.wait()
        ended.touch()
        until(lambda: not wanted.exists(), "the page to have seen it", patience=120)
        servers.append(start_server("lab", tmp_path, like=browser)[1])

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        path = browser.save("server", ["%load_ext jupyter_mlinfra", DETACHED])
        browser.run("restart.mjs", NOTEBOOK=path)
    finally:
        thread.join()
        for it in servers:
            it.terminate()
            it.wait(30)


SHOW = """\
import contextlib, io
with contextlib.redirect_stdout(io.StringIO()) as text:
    %remote use
print(*("on: " + row.split()[1] for row in text.getvalue().splitlines() if row[:3] == "on "))"""


@pytest.mark.parametrize("app", ["lab", "notebook"])
def test_where_cells_run_is_chosen(jupyter: Callable[[str], Browser], app: str) -> None:
    browser = jupyter(app)
    path = browser.save("picker", ["here = 1", SHOW, "there = 2"])
    browser.run("picker.mjs", NOTEBOOK=path, SHOW=SHOW)


CONFIG = """\
# mine
idle = "20m"  # patient

[targets.box]
provider = "ssh"
"""


def test_settings_are_saved_from_the_side_bar(
    fresh_jupyter: Callable[[str], Browser], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "user" / "mlinfra" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(CONFIG)
    monkeypatch.setenv("MLINFRA_TIME", "7m")
    browser = fresh_jupyter("lab")
    path = browser.save("settings", ["print(6 * 7)"])
    browser.run("settings.mjs", NOTEBOOK=path, CONFIG=str(config))
