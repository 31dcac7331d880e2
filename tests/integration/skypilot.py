"""A home directory for the real SkyPilot, whose only clouds are two clusters of Slurm.

Both names lead to one real cluster behind one real sshd; their prices differ. SkyPilot's list of
accelerators comes from the internet, so a small one in its format is put where it keeps them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from processes import free_port
from slurm_cluster import Cluster
from sshd import Sshd

from mlinfra_sdk.worker.uv import uv_binary

PROGRAMS = ("rsync", "socat", "nc")
"""What SkyPilot wants to have on the path."""

_CLUSTER = """\
Host {name}
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentityFile {folder}/id
  IdentitiesOnly yes
"""
_SETTINGS = """\
allowed_clouds: [slurm]
slurm:
  cluster_configs:
    dear: {pricing: {accelerators: {A10: 1.5}}}
    cheap: {pricing: {accelerators: {A10: 1.1}}}
"""


def missing() -> list[str]:
    """Programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextmanager
def home(folder: Path, login: Sshd) -> Iterator[Path]:
    """In this process and its children SkyPilot has this home directory and a server of its own,
    which is ended afterwards. The state directory is there, too."""
    cache = subprocess.run(
        [uv_binary(), "cache", "dir"], capture_output=True, text=True, check=True
    )
    clusters = [
        _CLUSTER.format(
            name=name, port=login.port, user=os.environ.get("USER", "root"), folder=login.folder
        )
        for name in ("dear", "cheap")
    ]
    accelerators = folder / ".sky" / "catalogs" / "v8" / "common" / "accelerators.csv"
    for path, text in {
        folder / ".slurm" / "config": "".join(clusters),
        folder / ".sky" / "config.yaml": _SETTINGS,
        accelerators: "AcceleratorName,Clouds\nA10,\"['Slurm']\"\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    port = str(free_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UV_CACHE_DIR", cache.stdout.strip())
        patch.setenv("HOME", str(folder))
        patch.setenv("SKY_RUNTIME_DIR", str(folder))
        patch.setenv("SKYPILOT_API_SERVER_LOCAL_PORT", port)
        patch.setenv("MLINFRA_HOME", str(folder / "mlinfra"))
        try:
            yield folder
        finally:
            _end_server(port)


def _end_server(port: str) -> None:
    """The server on this port, and what it has started."""
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if "sky.server.server" in words and port in words:
            family = [process, *process.children(recursive=True)]
            for one in family:
                one.kill()
            psutil.wait_procs(family, timeout=10)
            return


def jobs(cluster: Cluster) -> list[str]:
    """Names and time limits of what waits or runs in Slurm."""
    return cluster.command("squeue", "--noheader", "--format=%j %l").splitlines()
