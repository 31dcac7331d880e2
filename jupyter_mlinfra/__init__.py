"""Run notebook cells on remote machines: ``%load_ext jupyter_mlinfra``, then ``%%remote``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["__version__", "load_ipython_extension"]


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register the magics (called by ``%load_ext jupyter_mlinfra``)."""
    from .magics import load

    load(shell)


def _jupyter_server_extension_points() -> list[dict[str, Any]]:
    """What Jupyter Server loads."""
    from .server import MlinfraApp

    return [{"module": "jupyter_mlinfra.server", "app": MlinfraApp}]


def _jupyter_labextension_paths() -> list[dict[str, str]]:
    """Where the prebuilt JupyterLab extension lies (read by ``jupyter labextension develop``)."""
    return [{"src": "labextension", "dest": "jupyter-mlinfra"}]
