"""Environments on top of this one, for tests of other versions and of packages that others lack."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

from mlinfra_sdk.worker.uv import uv_binary


def on_top(folder: Path, *packages: str, options: tuple[str, ...] = ()) -> str:
    """The Python of a new one in this folder, with these packages; all else comes from here."""
    python = folder / "bin" / "python"
    uv = [uv_binary(), "--quiet"]
    subprocess.run([*uv, "venv", "--python", sys.executable, str(folder)], check=True)
    install = [*uv, "pip", "install", "--python", str(python), *options]
    subprocess.run([*install, *packages], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    here = sysconfig.get_path("purelib")
    (site / "here.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    return str(python)
