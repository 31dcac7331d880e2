"""The agent's directory is all that leads to it."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from live import Notebook, until


def test_an_agent_whose_directory_is_gone_ends(open_notebook: Callable[..., Notebook]) -> None:
    notebook = open_notebook()
    notebook.remote("1")
    assert notebook.agents() and notebook.workers()
    notebook.kill()
    shutil.rmtree(notebook.home)
    until(lambda: not notebook.processes(), "the agent to end", notebook.processes)
