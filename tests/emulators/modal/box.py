"""A sandbox: a folder with its own HOME, its commands as real processes, and its ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
from modal_proto import api_pb2

from emulators.modal.process import Process
from emulators.modal.programs import SMI, UV
from emulators.modal.volumes import Volume

HOME = "/root"
"""Where HOME lies in the sandboxes of the real service; paths below it are mapped."""

_TICK = 0.1
_Result = api_pb2.GenericResult


class Box:
    """One sandbox from its creation to its end. ``v1`` says by which calls it was made."""

    def __init__(
        self,
        folder: Path,
        app_id: str,
        definition: api_pb2.Sandbox,
        tags: Mapping[str, str],
        *,
        v1: bool,
        start_delay: float,
    ) -> None:
        alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
        word = "".join(secrets.choice(alphabet) for _ in range(22))
        self.v1 = v1
        self.id = f"sb-{word}" if v1 else f"sb-{word}V"
        self.task_id = f"ta-{word}" if v1 else f"ta-{word}V"
        self.app_id = app_id
        self.definition = definition
        self.tags = dict(tags)
        self.folder = folder / word
        self.created = time.time()
        self.began: float | None = None
        """When it was scheduled and began to cost."""
        self.over: float | None = None
        self.started = asyncio.Event()
        self.ended = asyncio.Event()
        self.result = _Result()
        self.execs: dict[str, Process] = {}
        self.main: Process | None = None
        self.tunnels: list[api_pb2.TunnelData] = []
        self.touched = time.monotonic()
        self._start_delay = start_delay
        self._end_asked: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        self._environment: dict[str, str] = {}

    @property
    def running(self) -> bool:
        """Whether it is scheduled and has not ended."""
        return self.started.is_set() and not self.ended.is_set()

    @property
    def home(self) -> Path:
        """Its HOME."""
        return self.folder / "root"

    def local(self, path: str) -> Path:
        """Where a path of the sandbox lies; only those below HOME have a place."""
        if ".." in path or not f"{path}/".startswith(f"{HOME}/"):
            raise ValueError(f"This emulator has only paths below {HOME}, not {path!r}.")
        return self.home / path[len(HOME) + 1 :]

    def _mapped(self, value: str) -> str:
        return str(self.local(value)) if value.startswith(f"{HOME}/") else value

    def end(self, status: int, text: str = "", exitcode: int = 0) -> None:
        """Ask for the end, which comes soon."""
        if not self._end_asked.done():
            self._end_asked.set_result(_Result(status=status, exception=text, exitcode=exitcode))

    async def live(
        self,
        python: Path,
        environment: Mapping[str, str],
        volumes: Mapping[str, Volume],
        gpu: tuple[str, str] | None,
        has_uv: bool,
        clock: Mapping[str, str],
        capacity: asyncio.Event,
    ) -> None:
        """Wait for a machine, run, and end. ``gpu`` is its name and memory as drivers say them,
        ``has_uv`` whether the image has uv, ``clock`` an environment that changes the time."""
        try:
            scheduled = asyncio.create_task(self._schedule(capacity))
            await asyncio.wait((scheduled, self._end_asked), return_when=asyncio.FIRST_COMPLETED)
            scheduled.cancel()
            if not self._end_asked.done():
                self._furnish(python, environment, volumes, gpu, has_uv, clock)
                await self._run()
            self.result = self._end_asked.result()
        finally:
            await asyncio.shield(asyncio.to_thread(self._clear))
            self.over = time.time()
            self.ended.set()

    async def _schedule(self, capacity: asyncio.Event) -> None:
        await capacity.wait()
        await asyncio.sleep(self._start_delay)

    def _furnish(
        self,
        python: Path,
        environment: Mapping[str, str],
        volumes: Mapping[str, Volume],
        gpu: tuple[str, str] | None,
        has_uv: bool,
        clock: Mapping[str, str],
    ) -> None:
        bin_folder, temporary = self.folder / "bin", self.folder / "tmp"
        for folder in (self.home, bin_folder, temporary):
            folder.mkdir(parents=True)
        for path, volume in volumes.items():
            place = self.local(path)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(volume.folder)
        for name in ("python", "python3"):
            (bin_folder / name).symlink_to(python)
        programs = {"uv": UV.format(python=python, image=python.parent.parent)} if has_uv else {}
        if gpu is not None:
            count = self.definition.resources.gpu_config.count
            programs["nvidia-smi"] = SMI.format(name=gpu[0], memory=gpu[1], count=count)
        for name, text in programs.items():
            (bin_folder / name).write_text(text)
            (bin_folder / name).chmod(0o755)
        self._environment = {
            "HOME": str(self.home),
            "PATH": f"{bin_folder}:{python.parent}:/usr/local/bin:/usr/bin:/bin",
            "TMPDIR": str(temporary),
            "LANG": "C.UTF-8",
            "MODAL_SANDBOX_ID": self.id,
            "MODAL_TASK_ID": self.task_id,
            "PIP_NO_INDEX": "1",  # tests use no network
            **clock,
            **{name: self._mapped(value) for name, value in environment.items()},
        }

    async def _run(self) -> None:
        definition = self.definition
        started = self.touched = time.monotonic()
        self.began = time.time()
        if definition.entrypoint_args:
            self.main = Process()
            await self.main.start(definition.entrypoint_args, self._environment, self._cwd(""))
        self.started.set()
        while not self._end_asked.done():
            now = time.monotonic()
            if any(not it.ended.is_set() for it in self.execs.values()):
                self.touched = now
            idle = definition.idle_timeout_secs
            if now - started > definition.timeout_secs:
                self.end(_Result.GENERIC_STATUS_TIMEOUT)
            elif definition.HasField("idle_timeout_secs") and now - self.touched > idle:
                self.end(_Result.GENERIC_STATUS_IDLE_TIMEOUT, "idle")
            elif self.main is not None and self.main.returncode is not None:
                code = self.main.returncode
                ok = _Result.GENERIC_STATUS_SUCCESS
                self.end(_Result.GENERIC_STATUS_FAILURE if code else ok, exitcode=code)
            await asyncio.wait((self._end_asked,), timeout=_TICK)

    def _cwd(self, workdir: str) -> str:
        return str(self.local(workdir or self.definition.workdir or HOME))

    async def exec(
        self, exec_id: str, argv: list[str], env: Mapping[str, str], workdir: str, timeout: float
    ) -> None:
        """Start a command; a second start with the same id is the same command."""
        if exec_id in self.execs:
            return
        process = self.execs[exec_id] = Process()
        try:
            cwd = self._cwd(workdir)
            await process.start(argv, {**self._environment, **env}, cwd, timeout or None)
        except BaseException:
            del self.execs[exec_id]
            raise

    def processes(self) -> list[psutil.Process]:
        """All processes of this sandbox, also those that left their session."""
        found = []
        mark = f"MODAL_SANDBOX_ID={self.id}".encode()
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    process = psutil.Process(pid)
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    def _clear(self) -> None:
        """End every process at once, as the end of a container does, and remove the folder."""
        while found := [it for it in self.processes() if it.pid != os.getpid()]:
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(found, timeout=1)
        shutil.rmtree(self.folder, ignore_errors=True)
