"""A pod and what its kubelet does with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

_TICK = 0.05
_MESSAGE_LIMIT = 4096
_UID = "TEST_POD_UID"
_Condition = dict[str, str]


def now() -> str:
    """The time as Kubernetes writes it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class Pod:
    """One pod from its creation until nothing of it is left. ``folder`` is its HOME."""

    def __init__(self, namespace: str, definition: Mapping[str, Any], folder: Path) -> None:
        self.namespace = namespace
        self.name: str = definition["metadata"]["name"]
        self.uid = str(uuid.uuid4())
        self.metadata: dict[str, Any] = {
            **definition["metadata"],
            "namespace": namespace,
            "uid": self.uid,
            "resourceVersion": "1",
            "creationTimestamp": now(),
        }
        self.spec: dict[str, Any] = dict(definition["spec"])
        self.folder = folder / self.uid
        self.phase = "Pending"
        self.reason = ""
        self.message = ""
        self.conditions: dict[str, _Condition] = {}
        self.container: dict[str, Any] = {}
        self.events: list[dict[str, Any]] = []
        self.deleted = asyncio.Event()
        """Deletion was asked for."""
        self.grace = 0.0
        self._main: asyncio.subprocess.Process | None = None

    @property
    def only(self) -> Mapping[str, Any]:
        """Its container."""
        container: Mapping[str, Any] = self.spec["containers"][0]
        return container

    @property
    def ended(self) -> bool:
        """Whether it has run to its end."""
        return self.phase in ("Succeeded", "Failed")

    @property
    def running(self) -> bool:
        """Whether commands can be run in it."""
        return "running" in self.container

    @property
    def main(self) -> int | None:
        """The number of its main process on this computer."""
        return self._main.pid if self._main is not None else None

    def gpus(self) -> int:
        """How many GPUs it asks for."""
        limits = self.only.get("resources", {}).get("limits", {})
        return int(limits.get("nvidia.com/gpu", 0))

    def as_json(self) -> dict[str, Any]:
        """As the API shows it."""
        status: dict[str, Any] = {
            "phase": self.phase,
            "conditions": list(self.conditions.values()),
        }
        if self.reason:
            status |= {"reason": self.reason, "message": self.message}
        if self.container:
            named = {"name": self.only["name"], "image": self.only["image"]}
            status["containerStatuses"] = [{**named, "state": self.container}]
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": self.metadata,
            "spec": self.spec,
            "status": status,
        }

    def told(self, reason: str, message: str) -> None:
        """Record an event about it."""
        self.events.append(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": f"{self.name}.{len(self.events)}"},
                "involvedObject": {"kind": "Pod", "name": self.name, "uid": self.uid},
                "reason": reason,
                "message": message,
                "lastTimestamp": now(),
            }
        )

    def condition(self, kind: str, status: bool, reason: str = "", message: str = "") -> None:
        """Set a condition."""
        self.conditions[kind] = {
            "type": kind,
            "status": str(status),
            "reason": reason,
            "message": message,
            "lastTransitionTime": now(),
        }

    def waits(self, reason: str, message: str = "") -> None:
        """Its container does not run yet, and why."""
        self.container = {"waiting": {"reason": reason, "message": message}}

    def end(self, phase: str, reason: str = "", message: str = "") -> None:
        """It is over; what still runs in it is killed by :meth:`run`."""
        if not self.ended:
            self.phase, self.reason, self.message = phase, reason, message

    async def run(self) -> None:
        """Start its container and wait until it, its deadline or its deletion ends the pod."""
        deadline = time.monotonic() + self.spec.get("activeDeadlineSeconds", 2**31)
        self._furnish()
        try:
            self._main = await asyncio.create_subprocess_exec(
                *self.only["command"],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                env=self.environment,
                cwd=self.folder,
                start_new_session=True,
            )
            self.phase, self.container = "Running", {"running": {"startedAt": now()}}
            self.condition("Ready", True)
            self.condition("ContainersReady", True)
            await self._until_end(deadline)
        finally:
            await asyncio.shield(asyncio.to_thread(self._clear))

    async def _until_end(self, deadline: float) -> None:
        assert self._main is not None
        exited = asyncio.create_task(self._main.wait())
        killed_at = 0.0
        while not exited.done() and not self.ended:
            if time.monotonic() > deadline:
                text = "Pod was active on the node longer than the specified deadline"
                self.end("Failed", "DeadlineExceeded", text)
            elif self.deleted.is_set() and not killed_at:
                killed_at = time.monotonic() + self.grace
                self._main.send_signal(signal.SIGTERM)
            elif killed_at and time.monotonic() > killed_at:
                break
            await asyncio.wait((exited,), timeout=_TICK)
        code = exited.result() if exited.done() else -signal.SIGKILL
        code = 128 - code if code < 0 else code
        self.container = {"terminated": {"exitCode": code, "message": self._last_words()}}
        if code == 137 and self.ended is False and not killed_at:
            self.container["terminated"]["reason"] = "OOMKilled"
        self.end("Failed" if code else "Succeeded")
        if not exited.done():
            self._main.kill()
            await exited

    @property
    def environment(self) -> dict[str, str]:
        """What its processes find."""
        return {
            "HOME": str(self.folder),
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "UV_OFFLINE": "1",  # tests talk to loopback only: packages come from this side
            "PIP_NO_INDEX": "1",
            _UID: self.uid,
            **{entry["name"]: entry["value"] for entry in self.only.get("env", [])},
        }

    @property
    def _messages(self) -> Path | None:
        path = self.only.get("terminationMessagePath")
        return Path(path) if path else None

    def _furnish(self) -> None:
        self.folder.mkdir(parents=True)
        if self._messages is not None:
            self._messages.touch(mode=0o666)

    def _last_words(self) -> str:
        if self._messages is None:
            return ""
        return self._messages.read_bytes()[:_MESSAGE_LIMIT].decode()

    async def exec(self, argv: Sequence[str]) -> asyncio.subprocess.Process:
        """Start a command beside the main process."""
        return await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment,
            cwd=self.folder,
            start_new_session=True,
            limit=1 << 20,
        )

    def processes(self) -> list[psutil.Process]:
        """All its processes, also those that left their session."""
        found = []
        mark = f"{_UID}={self.uid}".encode()
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    process = psutil.Process(pid)
                    if process.status() != psutil.STATUS_ZOMBIE:
                        found.append(process)
        return found

    def _clear(self) -> None:
        while found := self.processes():
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(found, timeout=1)
        # Real pods have a /tmp of their own. Folders there are of others, whose random names may
        # begin so too.
        for path in Path("/tmp").glob(f"{self.name}*"):
            if not path.is_dir():
                path.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)
