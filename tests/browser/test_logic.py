"""The logic of the JupyterLab extension, by Node.js's own test runner."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_logic() -> None:
    done = subprocess.run(
        [Path(sys.prefix) / "bin" / "node", "--test", Path(__file__).with_name("logic.test.mjs")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
