"""For a machine with an NVIDIA GPU and torch: `pytest tests/gpu`. Not part of the test command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory and a notebook's folder of the test's own."""
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLINFRA_SWEEP", "no")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"
