"""Real processes of a user: scripts and commands, each with a state directory of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

LIMIT = 60.0
"""Seconds after which a process hangs."""


class Place:
    """A folder with scripts, and the state directory that they use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.env = {**os.environ, "MLINFRA_HOME": str(self.home), "PYTHONUNBUFFERED": "1"}
        # With it ipykernel does not capture what is written below Python.
        self.env.pop("PYTEST_CURRENT_TEST", None)

    def write(self, name: str, code: str) -> Path:
        path = self.folder / name
        path.write_text(textwrap.dedent(code))
        return path

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        process = self.start(*command)
        try:
            out, err = process.communicate(stdin, timeout=LIMIT)
        finally:
            process.kill()
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def script(self, code: str, *arguments: str) -> str:
        """What a script prints; it must succeed."""
        path = self.write("script.py", code)
        done = self.run(str(path), *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    def mlinfra(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return self.run("-m", "mlinfra_sdk.cli", *words, stdin=stdin)

    def agents(self) -> list[psutil.Process]:
        """The machines of this place that run."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "mlinfra_sdk.worker" in words and words[-1].startswith(str(self.home)):
                found.append(process)
        return found

    def wait_until_no_agent(self) -> None:
        deadline = time.monotonic() + LIMIT
        while self.agents():
            assert time.monotonic() < deadline, "a machine goes on"
            time.sleep(0.05)


@contextmanager
def place(folder: Path) -> Iterator[Place]:
    """A place that leaves nothing running."""
    it = Place(folder)
    try:
        yield it
    finally:
        for agent in it.agents():
            agent.terminate()
        it.wait_until_no_agent()
