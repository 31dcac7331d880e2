"""What `on=ssh` adds: `python -m benchmarks ssh`.

Over one shared connection (ControlMaster) to an sshd on loopback, interleaved: random bytes through
our link, by scp and by rsync; and a warm cell beside ``ssh HOST true``. ``MLINFRA_BENCH_MIB`` sets
the size (default 512).
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import anyio
from sshd import Sshd, running

from benchmarks.harness import Figure, median, say
from benchmarks.link import CHUNK, SECRET, agent
from mlinfra_sdk.link.client import connect
from mlinfra_sdk.link.frames import Channel
from mlinfra_sdk.link.processes import open_relay
from mlinfra_sdk.link.session import LinkSession
from mlinfra_sdk.providers.ssh import SshRemote
from mlinfra_sdk.session import Session

ROUNDS = 5
WARM = 50
MIB = int(os.environ.get("MLINFRA_BENCH_MIB", "512"))
GOAL = 0.95
HOST = "box"


def main() -> list[Figure]:
    """All figures of this module."""
    with tempfile.TemporaryDirectory(prefix="mlinfra-bench-") as name:
        folder = Path(name)
        with running(folder / "box") as box, box.known():
            figures = _throughput(folder, box)
            say("warm cells over ssh")
            return [*figures, _warm_cells()]


def _throughput(folder: Path, box: Sshd) -> list[Figure]:
    """Ways to move the same bytes, one after the other in each round."""
    data, socket = folder / "data", folder / "agent"
    data.write_bytes(os.urandom(MIB << 20))
    there = multiprocessing.Process(target=_agent, args=(socket,), daemon=True)
    there.start()
    shared = SshRemote(HOST).command()[1:-2]  # without the program and the host
    ssh = shlex.join([str(box.folder / "client" / "ssh"), *shared])
    copy = [arg for arg in shared if arg != "-T"]
    scp = ["scp", "-q", "-S", str(box.folder / "client" / "ssh"), *copy]
    rsync = ["rsync", "--whole-file", "--inplace", "-e", ssh]
    here, copied = str(data), str(folder / "copy")
    ways: dict[str, dict[str, Callable[[], float]]] = {
        "up": {
            "link": lambda: anyio.run(_through_the_link, socket, True),
            "scp": lambda: _timed([*scp, here, f"{HOST}:{copied}"]),
            "rsync": lambda: _timed([*rsync, here, f"{HOST}:{copied}"]),
        },
        "down": {
            "link": lambda: anyio.run(_through_the_link, socket, False),
            "scp": lambda: _timed([*scp, f"{HOST}:{here}", copied]),
            "rsync": lambda: _timed([*rsync, f"{HOST}:{here}", copied]),
        },
    }
    figures = []
    for direction, tools in ways.items():
        seconds: dict[str, list[float]] = {name: [] for name in tools}
        for number in range(ROUNDS):
            say(f"{direction}, round {number + 1} of {ROUNDS}")
            for name, move in tools.items():
                Path(copied).unlink(missing_ok=True)
                seconds[name].append(move())
        rates = {name: (MIB << 20) / 1e9 / median(times) for name, times in seconds.items()}
        ours = rates.pop("link")
        met = ours >= GOAL * rates["scp"]
        figures.append(
            Figure(
                f"{MIB} MiB of random bytes {direction}",
                ours,
                "GB/s",
                rates,
                f">= {GOAL} of scp",
                met,
                f"median of {ROUNDS}; one ssh connection for all; ours in memory, theirs in files",
            )
        )
    there.terminate()
    there.join()
    return figures


def _agent(socket: Path) -> None:
    anyio.run(agent, socket)


async def _through_the_link(socket: Path, up: bool) -> float:
    """Seconds for the chunks through a link whose wire is ssh."""
    path = f"PYTHONPATH={os.pathsep.join(sys.path)}"  # wherever the SDK is imported from here
    argv = ["env", path, sys.executable, "-m", "mlinfra_sdk.link.relay", str(socket)]
    command = [*SshRemote(HOST).command(), shlex.join(argv)]
    count = (MIB << 20) // CHUNK
    async with connect(lambda: open_relay(command), SECRET) as session:
        start = time.perf_counter()
        await (_up if up else _down)(session, count)
        return time.perf_counter() - start


async def _up(session: LinkSession, count: int) -> None:
    chunk = os.urandom(CHUNK)
    for index in range(count):
        await session.send(Channel.BULK, chunk, stream=index == count - 1)
    await session.receive(Channel.CONTROL).__anext__()


async def _down(session: LinkSession, count: int) -> None:
    await session.send(Channel.CONTROL, b"bulk", count)
    chunks = session.receive(Channel.BULK)
    for _ in range(count):
        await chunks.__anext__()


def _timed(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


def _warm_cells() -> Figure:
    """A cell that changes a variable, beside a command over the same connection."""
    cells, commands = [], []
    command = [*SshRemote(HOST).command(), "true"]
    with Session(namespace={"x": 0}, on=f"ssh:{HOST}") as session:
        for _ in range(5):
            session.run("x += 1")
        for _ in range(WARM):
            start = time.perf_counter()
            session.run("x += 1")
            cells.append((time.perf_counter() - start) * 1e3)
            commands.append(_timed(command) * 1e3)
    return Figure(
        "warm cell that changes a variable",
        median(cells),
        "ms",
        {"ssh HOST true": median(commands)},
        note=f"median of {WARM}, over one ssh connection",
    )
