"""A program's stdin and stdout on a Jupyter Server, beside jupyter-kernel-client if installed."""

from __future__ import annotations

import importlib.util
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import anyio
import anyio.to_thread

from benchmarks.harness import Figure, say
from mlinfra_sdk.errors import LinkError
from mlinfra_sdk.providers.jupyter.process import KernelProcess, open_process
from mlinfra_sdk.providers.jupyter.server import Server

_TRIPS = 200
_BULK = 100 << 20
_PEER = "jupyter-kernel-client"
_SINK = f"""\
import os
left = {_BULK}
while left: left -= len(os.read(0, 1 << 20))
os.write(1, b"k")
"""
_SOURCE = f"import os\nfor n in range({_BULK >> 20}): os.write(1, bytes(1 << 20))"


def main() -> list[Figure]:
    """All figures of this module."""
    with _served() as (url, token):
        return anyio.run(_main, url, token)


@contextmanager
def _served() -> Iterator[tuple[str, str]]:
    """A server's URL and token."""
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as home, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root"),
                *(f"--ServerApp.port={port}", f"--ServerApp.root_dir={home}"),
            ],
            env=os.environ | {"HOME": home, "JUPYTER_TOKEN": token},
            stderr=subprocess.DEVNULL,
        )
        try:
            yield f"http://127.0.0.1:{port}/", token
        finally:
            process.terminate()
            process.wait()


async def _main(url: str, token: str) -> list[Figure]:
    async def current() -> str:
        return token

    server = Server(url, current)
    with anyio.fail_after(60):
        while True:
            try:
                kernel = (await server.ask("POST", "api/kernels", {}))["id"]
                break
            except LinkError:
                await anyio.sleep(0.1)
    say("round trip")
    trip = await _round_trip(await open_process(server, kernel, ["cat"]))
    peers = {}
    if importlib.util.find_spec("jupyter_kernel_client") is not None:
        trips = await anyio.to_thread.run_sync(_peer_trip, url, token, kernel)
        peers[_PEER] = trips * 1e3
    say("bulk")
    up = await _up(await open_process(server, kernel, [sys.executable, "-c", _SINK]))
    down = await _down(await open_process(server, kernel, [sys.executable, "-c", _SOURCE]))
    note = f"median of {_TRIPS}; the peer executes `1` in the same kernel"
    return [
        Figure("round trip of 100 bytes", trip * 1e3, "ms", peers, note=note),
        Figure("bulk up", _BULK / up / 1e6, "MB/s"),
        Figure("bulk down", _BULK / down / 1e6, "MB/s"),
    ]


async def _round_trip(process: KernelProcess) -> float:
    times = []
    space = memoryview(bytearray(100))
    for _ in range(_TRIPS):
        start = time.perf_counter()
        await process.send([bytes(100)])
        got = 0
        while got < 100:
            got += await process.receive_into(space)
        times.append(time.perf_counter() - start)
    await process.aclose()
    return median(times)


def _peer_trip(url: str, token: str, kernel: str) -> float:
    from jupyter_kernel_client import JupyterKernelClient  # type: ignore[import-not-found]

    times = []
    with JupyterKernelClient(server_url=url, token=token, kernel_id=kernel) as client:
        for _ in range(_TRIPS):
            start = time.perf_counter()
            client.execute("1")
            times.append(time.perf_counter() - start)
    return median(times)


async def _up(process: KernelProcess) -> float:
    data, space = os.urandom(1 << 20), memoryview(bytearray(1))
    start = time.perf_counter()
    for _ in range(_BULK >> 20):
        await process.send([data])
    await process.receive_into(space)
    spent = time.perf_counter() - start
    await process.aclose()
    return spent


async def _down(process: KernelProcess) -> float:
    space = memoryview(bytearray(1 << 20))
    start = time.perf_counter()
    while await process.receive_into(space):
        pass
    spent = time.perf_counter() - start
    await process.aclose()
    return spent
