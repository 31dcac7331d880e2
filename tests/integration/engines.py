"""Where clients that are killed have their machines: what runs there, and what it has cost."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from mlinfra_sdk.providers.base import Handle

PRICE = 3_600_000
"""Micro-USD per hour: 1000 per second."""
FLAKY = Path(__file__).parents[2] / "benchmarks" / "flaky" / "flaky"


class Engine:
    """A backend: what a client asks for, in which environment, and what is there. ``program`` is
    the one on PATH whose calls can go wrong."""

    name = "local"
    program = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def request(self, number: int) -> dict[str, Any]:
        """What the client of this number asks for."""
        return {"on": "local", "isolate": True, "price": PRICE}

    def environment(self, home: Path) -> dict[str, str]:
        """What a client needs in its environment."""
        return {}

    def alive(self, keys: list[str]) -> list[str]:
        """Which of these machines run; each as often as it does."""
        return agents(keys)

    def bill(self, keys: list[str]) -> float | None:
        """USD that they have cost, by the engine's own account; None if it has none."""
        return None

    def ended(self, handle: Handle) -> float | None:
        """When a machine has ended, by the engine's own account; None if it has none."""
        return None

    def hang_up(self) -> None:
        """End what clients in this process keep open between calls."""

    def flaky(self, home: Path, number: int, fault: str) -> dict[str, str]:
        """An environment in which this call of :attr:`program` goes wrong."""
        folder, front = home / "calls", home / "front"
        for path in (folder, front):
            path.mkdir()
        (folder / "number").write_text(str(number))
        (folder / "fault").write_text(fault)
        (front / self.program).symlink_to(FLAKY)
        path = self.environment(home).get("PATH", os.environ["PATH"])
        return {"FLAKY": str(folder), "FLAKY_PATH": path, "PATH": f"{front}:{path}"}


def agents(keys: list[str]) -> list[str]:
    """The keys of agents that run on this computer, of these."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if "mlinfra_sdk.worker" in words and process.info["status"] != psutil.STATUS_ZOMBIE:
            key = Path(words[-1]).name
            found += [key] if key in keys else []
    return found


class Modal(Engine):
    """The emulator of Modal's service; every second client asks for a GPU (other calls)."""

    name = "modal"
    EARLIER = 6 * 3600.0

    def __init__(self, folder: Path, service: Any) -> None:
        super().__init__(folder)
        self.service = service
        self.service.faults.billed_earlier = self.EARLIER

    def request(self, number: int) -> dict[str, Any]:
        return {"on": "modal"} | ({"gpu": "T4"} if number % 2 else {})

    def environment(self, home: Path) -> dict[str, str]:
        return {**self.service.environment, "MODAL_CONFIG_PATH": str(home / "modal.toml")}

    def alive(self, keys: list[str]) -> list[str]:
        return [key for box in self.service.boxes() for key in box.tags.values()]

    def bill(self, keys: list[str]) -> float | None:
        return sum(self.service.billed(key) for key in keys)

    def calm(self) -> None:
        """Switch all faults off but the one that saves waiting."""
        self.service.heal()
        self.service.faults.billed_earlier = self.EARLIER


class Ssh(Engine):
    """A real sshd on loopback."""

    name = "ssh"
    program = "ssh"

    def __init__(self, folder: Path, box: Any) -> None:
        super().__init__(folder)
        self._box = box

    def request(self, number: int) -> dict[str, Any]:
        return {"on": "ssh:box", "price": PRICE}

    def environment(self, home: Path) -> dict[str, str]:
        return {"PATH": f"{self._box.folder}/client:{os.environ['PATH']}"}

    def hang_up(self) -> None:
        self._box.hang_up()


class Slurm(Engine):
    """A real Slurm of one node."""

    name = "slurm"
    program = "sbatch"

    def __init__(self, folder: Path, cluster: Any) -> None:
        super().__init__(folder)
        self._cluster = cluster

    def request(self, number: int) -> dict[str, Any]:
        return {"on": "slurm", "price": PRICE, "time": 600.0}

    def environment(self, home: Path) -> dict[str, str]:
        shared = self.folder / "sdk"
        shared.mkdir(exist_ok=True)
        state = home / "host"
        state.mkdir(mode=0o700, exist_ok=True)
        if not (state / "sdk").exists():
            (state / "sdk").symlink_to(shared)
        return dict(self._cluster.env)

    def alive(self, keys: list[str]) -> list[str]:
        return str(self._cluster.command("squeue", "--noheader", "--format=%k")).split()

    def ended(self, handle: Handle) -> float | None:
        job = self._cluster.command("scontrol", "show", "job", handle.data["job"])
        found = re.search(r"EndTime=(\S+)", job)
        assert found is not None, job
        return datetime.fromisoformat(found[1]).timestamp()


class Container(Engine):
    """Containers of podman with runc, on an image that shows this computer's own programs."""

    name = "container"
    program = "podman"
    OPTIONS = ("--cgroup-manager", "cgroupfs", "--runtime", "/usr/sbin/runc")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        (folder / "volume").mkdir()
        python = sys.base_prefix
        seen = ["/usr"] if python.startswith("/usr") else ["/usr", python]
        extra = ["--network=host", "--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096"]
        extra += [f"--volume={path}:{path}:ro" for path in seen]
        listed = ", ".join(f'"{word}"' for word in extra)
        self._config = (
            f'[targets.box]\nprovider = "container"\nimage = "mlinfra-test"\n'
            f'engine = "podman {" ".join(self.OPTIONS)}"\nextra = [{listed}]\n'
            f'volume = "{folder}/volume"\npython = "{python}/bin/python3"\n'
        )

    def request(self, number: int) -> dict[str, Any]:
        return {"on": "box", "price": PRICE}

    def environment(self, home: Path) -> dict[str, str]:
        config = home / "config" / "mlinfra"
        config.mkdir(parents=True, exist_ok=True)
        (config / "config.toml").write_text(self._config)
        return {"XDG_CONFIG_HOME": str(config.parent)}

    def alive(self, keys: list[str]) -> list[str]:
        done = subprocess.run(
            ["podman", *self.OPTIONS, "ps", "--format={{.Names}}"], capture_output=True, text=True
        )
        return [name.removeprefix("mlinfra-") for name in done.stdout.split()]

    def ended(self, handle: Handle) -> float | None:
        which = [f"--filter=container={handle.data['name']}", "--filter=event=died"]
        how = ["--stream=false", "--format={{.Time.Unix}}"]
        done = subprocess.run(
            ["podman", *self.OPTIONS, "events", *which, *how], capture_output=True, text=True
        )
        return float(done.stdout)


@contextlib.contextmanager
def engine(name: str, folder: Path) -> Iterator[Engine]:
    """One of these by its name, for a while."""
    folder.mkdir(parents=True)
    with _ENGINES[name](folder) as it:
        yield it


@contextlib.contextmanager
def _local(folder: Path) -> Iterator[Engine]:
    yield Engine(folder)


@contextlib.contextmanager
def _modal(folder: Path) -> Iterator[Engine]:
    from emulators.modal import emulator

    with emulator() as service:
        yield Modal(folder, service)


@contextlib.contextmanager
def _ssh(folder: Path) -> Iterator[Engine]:
    from sshd import running

    with running(folder / "box") as box:
        yield Ssh(folder, box)


@contextlib.contextmanager
def _slurm(folder: Path) -> Iterator[Engine]:
    from slurm_cluster import slurm

    with slurm() as cluster:
        yield Slurm(folder, cluster)


@contextlib.contextmanager
def _container(folder: Path) -> Iterator[Engine]:
    from test_container import image

    image()
    yield Container(folder)


_ENGINES: dict[str, Callable[[Path], contextlib.AbstractContextManager[Engine]]] = {
    "local": _local,
    "modal": _modal,
    "ssh": _ssh,
    "slurm": _slurm,
    "container": _container,
}


def missing(name: str) -> bool:
    """Whether what this engine needs is not on this computer."""
    from slurm_cluster import missing as slurm_lacks

    if name == "slurm":
        return bool(slurm_lacks())
    programs = {"container": ("podman", "runc"), "ssh": ("ssh", "ssh-keygen")}.get(name, ())
    return any(shutil.which(it) is None for it in programs)
