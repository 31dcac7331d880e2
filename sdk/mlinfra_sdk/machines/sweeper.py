"""The sweep at the start of a session, in a process of its own: no cell waits for it, and nothing
is imported into the user's kernel for it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import msgspec

from mlinfra_sdk import targets
from mlinfra_sdk.errors import LedgerError
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines.sweep import Sweep

EVERY = 600.0
"""Seconds between two sweeps, of all sessions of the user together."""
VARIABLE = "MLINFRA_SWEEP"
"""``no`` in the environment leaves sweeping to ``mlinfra sweep``."""
_COMMAND = """import sys
sys.path[:] = filter(None, sys.path)  # modules are not looked for in the notebook's folder
from mlinfra_sdk.cli import main
main(["sweep", "--json"])"""
_PRIORITY = 10


class Sweeper:
    """Starts sweeps, and tells what they have found once they are done."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, ledger: Ledger) -> None:
        """Begin one in the background, unless it is too early, or no machine was ever started
        that could outlive this computer's processes."""
        if self._process is not None or os.environ.get(VARIABLE, "").lower() == "no":
            return
        with contextlib.suppress(LedgerError, OSError):
            if not any(machine.provider != targets.DEFAULT for machine in ledger.machines()):
                return
            if ledger.sweep_begins(EVERY):
                self._process = subprocess.Popen(
                    ["nice", "-n", str(_PRIORITY), sys.executable, "-c", _COMMAND],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )

    def news(self) -> list[str]:
        """What the sweep that has just ended has found, a sentence each; nothing while it runs."""
        process = self._process
        if process is None or process.poll() is None:
            return []
        self._process = None
        assert process.stdout is not None
        with process.stdout, contextlib.suppress(msgspec.DecodeError):
            found = msgspec.json.decode(process.stdout.read(), type=Sweep)
            return [str(finding) for finding in found.findings if finding.what != "gone"]
        return []


sweeper = Sweeper()
"""This process's own."""
