"""What exists at the service: apps, images, secrets, volumes and sandboxes; and what it refuses."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import secrets
import sys
import time
import venv
from collections.abc import Mapping
from pathlib import Path

from grpclib import GRPCError, Status
from modal_proto import api_pb2

from emulators.modal.box import Box
from emulators.modal.faults import Faults
from emulators.modal.tunnels import Tunnels
from emulators.modal.volumes import BlockStore, Volume

TOKEN = ("ak-emulated", "as-emulated")

GPUS = {
    "T4": ("Tesla T4", "15360"),
    "L4": ("NVIDIA L4", "23034"),
    "A10": ("NVIDIA A10", "23028"),
    "A10G": ("NVIDIA A10", "23028"),
    "L40S": ("NVIDIA L40S", "46068"),
    "A100": ("NVIDIA A100-SXM4-40GB", "40960"),
    "A100-40GB": ("NVIDIA A100-SXM4-40GB", "40960"),
    "A100-80GB": ("NVIDIA A100 80GB PCIe", "81920"),
    "RTX-PRO-6000": (
        "NVIDIA RTX PRO 6000 Blackwell Server Edition",
        "97887",
    ),
    "H100": ("NVIDIA H100 80GB HBM3", "81559"),
    "H100!": ("NVIDIA H100 80GB HBM3", "81559"),
    "H200": ("NVIDIA H200", "143771"),
    "B200": ("NVIDIA B200", "183359"),
    "B200+": ("NVIDIA B200", "183359"),
}
"""Names that the service takes, and what drivers say there: name and MiB."""

_MOST_GPUS = {"A10": 4, "A10G": 4}
_LONGEST = 24 * 3600
_TOKEN_LIFE = 20 * 60

RATES = {
    "T4": "0.000164",
    "L4": "0.000222",
    "A10": "0.000306",
    "L40S": "0.000542",
    "A100-40GB": "0.000583",
    "A100-80GB": "0.000694",
    "H100": "0.001097",
    "H200": "0.001261",
    "B200": "0.001736",
    "CPU": "0.0000131",
    "Memory": "0.00000222",
}
"""USD per second of a GPU, of a core, and of a GiB. The real service's names are not known."""


def faketime(clock: str) -> dict[str, str]:
    """An environment in which programs see another time."""
    found = sorted(Path("/usr").glob("lib*/**/faketime/libfaketime.so.1"))
    if not found:
        raise FileNotFoundError("libfaketime is not installed")
    return {
        "LD_PRELOAD": str(found[0]),
        "FAKETIME": clock,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_RESET": "1",
    }


def refused(status: Status, text: str) -> GRPCError:
    """An answer that says no."""
    return GRPCError(status, text)


class World:
    """The state of one account. Used in the emulator's event loop only."""

    def __init__(self, folder: Path) -> None:
        self.faults = Faults()
        self.apps: dict[str, str] = {}
        self.images: dict[str, api_pb2.Image] = {}
        self.secrets: dict[str, dict[str, str]] = {}
        self.named_secrets: dict[str, str] = {}
        self.volumes: dict[str, Volume] = {}
        self.boxes: dict[str, Box] = {}
        self.blocks = BlockStore(folder / "blocks")
        self.tunnels = Tunnels(folder)
        self.url = ""
        self.rates = dict(RATES)
        self.capacity = asyncio.Event()
        self._tokens: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._folder = folder
        self._python = _make_python(folder / "image")

    def disturbed(self, name: str) -> str:
        """How the next call of this method goes wrong."""
        fault, times = self.faults.disturbed.get(name, ("", 0))
        if times <= 0:
            return ""
        self.faults.disturbed[name] = (fault, times - 1)
        return fault

    def new_id(self, prefix: str) -> str:
        """A fresh id."""
        return f"{prefix}-{secrets.token_hex(11)}"

    def add_volume(self, name: str) -> Volume:
        """An empty volume."""
        volume = Volume(self.new_id("vo"), name, self._folder / f"volume-{len(self.volumes)}")
        volume.folder.mkdir()
        self.volumes[volume.id] = volume
        return volume

    # -- images ------------------------------------------------------------------------------

    def image_lines(self, image_id: str) -> list[str]:
        """The commands of an image and of those below it, the lowest first."""
        image = self.images[image_id]
        below = [line for base in image.base_images for line in self.image_lines(base.image_id)]
        return below + list(image.dockerfile_commands)

    def _clock(self) -> dict[str, str]:
        if not self.faults.machine_clock:
            return {}
        return faketime(self.faults.machine_clock)

    def _check_image(self, image_id: str) -> None:
        if image_id not in self.images:
            raise refused(Status.NOT_FOUND, f"Image {image_id} not found")
        lines = self.image_lines(image_id)
        found = re.search(r"FROM python:(\d+\.\d+)", "\n".join(lines))
        here = f"{sys.version_info[0]}.{sys.version_info[1]}"
        if found is None or found[1] != here:
            asked = found[1] if found else "another image"
            text = f"This emulator has only images with Python {here}, not {asked}"
            raise refused(Status.FAILED_PRECONDITION, text)

    # -- sandboxes ---------------------------------------------------------------------------

    def create(
        self, app_id: str, definition: api_pb2.Sandbox, tags: Mapping[str, str], *, v1: bool
    ) -> Box:
        """Take on a sandbox; it is scheduled and started later."""
        gpu = self._check(app_id, definition, v1=v1)
        box = Box(
            self._folder,
            app_id,
            definition,
            tags,
            v1=v1,
            start_delay=self.faults.start_delay,
        )
        for mount in definition.volume_mounts:
            try:
                box.local(mount.mount_path)
            except ValueError as error:
                raise refused(Status.INVALID_ARGUMENT, str(error)) from None
        self.boxes[box.id] = box
        if self.faults.capacity:
            self.capacity.set()
        else:
            self.capacity.clear()
        environment: dict[str, str] = {}
        for secret in definition.secret_ids:
            environment.update(self.secrets[secret])
        volumes = {it.mount_path: self.volumes[it.volume_id] for it in definition.volume_mounts}
        lines = self.image_lines(definition.image_id)
        has_uv = any("install" in line and "uv" in line.split() for line in lines)
        given = GPUS[self.faults.wrong_gpu or gpu] if gpu else None
        task = asyncio.create_task(
            box.live(
                self._python, environment, volumes, given, has_uv, self._clock(), self.capacity
            )
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return box

    def _check(self, app_id: str, definition: api_pb2.Sandbox, *, v1: bool) -> str:
        invalid = Status.INVALID_ARGUMENT
        if self.faults.refuse:
            raise refused(Status.RESOURCE_EXHAUSTED, self.faults.refuse)
        if app_id not in self.apps.values():
            raise refused(Status.NOT_FOUND, f"App {app_id} not found")
        self._check_image(definition.image_id)
        if not 1 <= definition.timeout_secs <= _LONGEST:
            raise refused(invalid, f"timeout must be between 1 and {_LONGEST} seconds")
        if definition.HasField("idle_timeout_secs") and not definition.idle_timeout_secs:
            raise refused(invalid, "idle_timeout must be positive")
        if definition.workdir and not definition.workdir.startswith("/"):
            raise refused(invalid, "workdir must be absolute")
        for secret in definition.secret_ids:
            if secret not in self.secrets:
                raise refused(Status.NOT_FOUND, f"Secret {secret} not found")
        for mount in definition.volume_mounts:
            if mount.volume_id not in self.volumes:
                raise refused(Status.NOT_FOUND, f"Volume {mount.volume_id} not found")
        ports = [it.port for it in definition.open_ports.ports]
        if len(set(ports)) < len(ports) or not all(1 <= port < 1 << 16 for port in ports):
            raise refused(invalid, f"Invalid ports: {ports}")
        if any(it.unencrypted or it.tunnel_type for it in definition.open_ports.ports):
            raise refused(Status.UNIMPLEMENTED, "this emulator has TLS tunnels only")
        config = definition.resources.gpu_config
        if config.gpu_type:
            if not v1:
                raise refused(invalid, "GPUs are not supported by V2 sandboxes")
            if config.gpu_type not in GPUS:
                raise refused(invalid, f"Unknown GPU type: {config.gpu_type}")
            if not 1 <= config.count <= _MOST_GPUS.get(config.gpu_type, 8):
                raise refused(invalid, f"Invalid GPU count for {config.gpu_type}: {config.count}")
        if definition.name and self.named(app_id, definition.name) is not None:
            text = f"Sandbox with name '{definition.name}' already exists"
            raise refused(Status.ALREADY_EXISTS, text)
        return config.gpu_type

    def box(self, box_id: str) -> Box:
        """The sandbox of this id."""
        try:
            return self.boxes[box_id]
        except KeyError:
            raise refused(Status.NOT_FOUND, f"Sandbox {box_id} not found") from None

    def of_task(self, task_id: str) -> Box:
        """The sandbox of this task, which must run."""
        for box in self.boxes.values():
            if box.task_id == task_id:
                if not box.running:
                    raise refused(Status.FAILED_PRECONDITION, "Sandbox has already finished")
                return box
        raise refused(Status.NOT_FOUND, f"Task {task_id} not found")

    def named(self, app_id: str, name: str) -> Box | None:
        """The sandbox of this name that has not ended."""
        for box in self.boxes.values():
            if box.app_id == app_id and box.definition.name == name and not box.ended.is_set():
                return box
        return None

    # -- tokens of the command router --------------------------------------------------------

    def grant(self, task_id: str) -> str:
        """A token for the command router of this task."""
        life = 20 if self.faults.expired else _TOKEN_LIFE
        token = make_jwt(
            {"task": task_id, "exp": int(time.time()) + life, "n": secrets.token_hex(4)}
        )
        self._tokens[token] = task_id
        return token

    def admit(self, authorization: str, task_id: str) -> None:
        """Check a token for this task."""
        if self.faults.expired:
            self.faults.expired -= 1
            raise refused(Status.UNAUTHENTICATED, "token expired")
        if self._tokens.get(authorization.removeprefix("Bearer ")) != task_id:
            raise refused(Status.UNAUTHENTICATED, "invalid token")

    async def close(self) -> None:
        """End all sandboxes."""
        for box in self.boxes.values():
            box.end(api_pb2.GenericResult.GENERIC_STATUS_TERMINATED)
        if self._tasks:
            await asyncio.wait(self._tasks)
        self.tunnels.close()
        await self.blocks.close()


def make_jwt(payload: Mapping[str, object]) -> str:
    """An unsigned token of three parts, as clients read its expiry."""
    parts = [{"alg": "none"}, payload]
    encoded = [base64.urlsafe_b64encode(json.dumps(it).encode()).rstrip(b"=") for it in parts]
    return b".".join([*encoded, b"x"]).decode()


def _make_python(folder: Path) -> Path:
    """A Python that has the packages of this one, but not what is under development here: its
    path files are not read."""
    venv.EnvBuilder(symlinks=True).create(folder)
    site = next(folder.glob("lib/python*/site-packages"))
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site / "packages.pth").write_text("\n".join(packages) + "\n")
    return folder / "bin" / "python"
