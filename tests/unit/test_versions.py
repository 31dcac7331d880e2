"""Both distributions and the JupyterLab extension carry one version."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jupyter_mlinfra
import mlinfra_sdk._version

ROOT = Path(__file__).parents[2]


def test_versions_agree() -> None:
    version = jupyter_mlinfra.__version__
    lock = json.loads((ROOT / "package-lock.json").read_text())
    requirement = re.search(r'"mlinfra-sdk==([^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert mlinfra_sdk._version.__version__ == version
    assert json.loads((ROOT / "package.json").read_text())["version"] == version
    assert lock["version"] == lock["packages"][""]["version"] == version
    assert requirement and requirement[1] == version
