"""Wheels of projects on this disk."""

from __future__ import annotations

import os
import signal
import sys
import threading
import zipfile
from pathlib import Path

import psutil
import pytest
from processes import until

from mlinfra_sdk.environment import wheels

BACKEND = """
import pathlib, sys, time, zipfile
def build_wheel(folder, config_settings=None, metadata_directory=None):
    here = pathlib.Path(__file__).parent
    while (here / "slow").exists():
        (here / "building").touch()
        time.sleep(0.1)
    tag = "cp%d%d" % sys.version_info[:2]
    name = f"mine-1-{tag}-{tag}-any.whl"
    with zipfile.ZipFile(pathlib.Path(folder) / name, "w") as wheel:
        wheel.writestr("mine-1.dist-info/METADATA", "Name: mine\\nVersion: 1")
        for path in here.rglob("env/*.py"):
            wheel.write(path, path.relative_to(here))
    return name
"""
METADATA = """
[project]
name = "mine"
version = "1"
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose backend waits while there is a file ``slow``."""
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path / "home"))
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(METADATA)
    (folder / "backend.py").write_text(BACKEND)
    return folder


def wheel_of(project: Path) -> Path:
    return wheels.of_project(project, "mine", lambda text: None)


def test_an_interrupt_ends_a_build_at_once(project: Path) -> None:
    (project / "slow").touch()

    def interrupt() -> None:
        until((project / "building").exists, "the build")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        wheel_of(project)
    thread.join()
    builds = [it for it in psutil.process_iter() if str(project) in " ".join(_command(it))]
    assert builds == []
    (project / "slow").unlink()
    assert wheel_of(project).exists()


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def test_the_python_that_runs_here_builds(project: Path) -> None:
    (project / ".python-version").write_text("3.99\n")
    assert f"cp{sys.version_info[0]}{sys.version_info[1]}" in wheel_of(project).name


def test_a_change_anywhere_in_the_source_is_seen(project: Path) -> None:
    module = project / "mine" / "env" / "game.py"
    module.parent.mkdir(parents=True)
    module.write_text("x = 1")
    first = wheel_of(project)
    module.write_text("x = 22")
    second = wheel_of(project)
    with zipfile.ZipFile(second) as wheel:
        assert wheel.read("mine/env/game.py") == b"x = 22"
    # What is no source of it: an environment of the user's, and what builds leave.
    (project / "env" / "lib").mkdir(parents=True)
    (project / "env" / "pyvenv.cfg").touch()
    (project / "env" / "lib" / "other.py").touch()
    (project / "build").mkdir()
    (project / "build" / "leftover.py").touch()
    assert wheel_of(project) == second != first
