"""The notebook's folder and its twin: `python -m benchmarks files`; small with `SMALL=1` before it.

A session with a machine over ssh to an sshd on loopback, already started, and rsync over the same
ssh connection (ControlMaster). Both are given the same files. Peak memory is that of the
benchmark's own process and of the machine's agent, above what they had before.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
from sshd import Sshd, running

from benchmarks.harness import Figure, median, say
from mlinfra_sdk.providers.ssh import SshRemote
from mlinfra_sdk.session import Session

MIB = 1 << 20
SMALL = bool(os.environ.get("SMALL"))
COUNT = 1000 if SMALL else 10_000
BIG = (64 if SMALL else 2048) * MIB
ROUNDS = 3
GOAL_MEMORY = 200 * MIB


class Pair:
    """A folder, its twin on a machine, and a copy that rsync makes there."""

    def __init__(self, folder: Path, box: Sshd) -> None:
        self.source = folder / "source"
        self.copy = folder / "copy"
        self.source.mkdir()
        self.session = Session(
            on="ssh:box", env="none", root=self.source, sync_limit="4GB", namespace={}
        )
        self.session.run("1")
        machine = self.session.machine
        assert machine is not None
        self.agent = next(it.pid for it in psutil.process_iter() if _is_agent(it, machine.id))
        options = SshRemote("box").command()[1:-2]  # without the program and the host
        self._ssh = shlex.join([str(box.folder / "client" / "ssh"), *options])

    def sync(self) -> float:
        start = time.perf_counter()
        self.session.sync()
        return time.perf_counter() - start

    def rsync(self, *options: str) -> float:
        own = ["rsync", "-a", "--delete", "-e", self._ssh, *options]
        command = [*own, f"{self.source}/", f"box:{self.copy}/"]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        return time.perf_counter() - start


def _is_agent(process: psutil.Process, key: str) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return "mlinfra_sdk.worker" in command and command[-1].endswith(key)


def main() -> list[Figure]:
    """All figures of this module."""
    folder = Path(tempfile.mkdtemp(prefix="mlinfra-bench-"))
    os.environ["MLINFRA_HOME"] = str(folder / "home")
    try:
        with running(folder / "box") as box, box.known():
            pair = Pair(folder, box)
            try:
                return [*_many(pair), *_one_byte(pair)]
            finally:
                pair.session.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _many(pair: Pair) -> list[Figure]:
    say(f"{COUNT} files of 4 kB")
    first, first_rsync, again, again_rsync = [], [], [], []
    for number in range(ROUNDS):
        data = pair.source / f"data{number}"
        for index in range(COUNT):
            file = data / str(index % 100) / f"{index}.bin"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(os.urandom(4096))
        first.append(pair.sync())
        first_rsync.append(pair.rsync())
        again.append(pair.sync())
        again_rsync.append(pair.rsync())
        shutil.rmtree(data)
        pair.session.sync(delete=True)
        pair.rsync()
    note = f"median of {ROUNDS}; ours in an open session; rsync -a by the same ssh, with its start"
    return [
        _figure(f"{COUNT} files of 4 kB, first", median(first), median(first_rsync), note),
        _figure(f"{COUNT} files of 4 kB, again", median(again), median(again_rsync), note),
    ]


def _one_byte(pair: Pair) -> list[Figure]:
    say(f"one byte of {BIG // MIB} MiB")
    file = pair.source / "big.bin"
    with file.open("wb") as out:
        for _ in range(BIG // MIB):
            out.write(os.urandom(MIB))
    os.sync()
    processes = os.getpid(), pair.agent
    before = [_reset_peak(pid) for pid in processes]
    first, first_rsync = pair.sync(), pair.rsync()
    ours, theirs = [], []
    for number in range(ROUNDS):
        with file.open("r+b") as out:
            out.seek(BIG // 3 + number)
            out.write(os.urandom(1))
        ours.append(pair.sync())
        theirs.append(pair.rsync("--no-whole-file"))
    memory = max(_peak(pid) - old for pid, old in zip(processes, before, strict=True))
    note = "rsync -a over the same ssh connection"
    name = f"{BIG // MIB} MiB in one file"
    return [
        _figure(f"{name}, first", first, first_rsync, f"once; {note}", goal=""),
        _figure(f"{name}, one byte changed", median(ours), median(theirs), f"median; {note}"),
        Figure(
            f"{name}: peak memory",
            memory / MIB,
            "MiB",
            goal="<= 200 MiB",
            met=memory <= GOAL_MEMORY,
            note="the larger one of both sides, above what it had before",
        ),
    ]


def _figure(what: str, ours: float, rsync: float, note: str, goal: str = "<= rsync") -> Figure:
    met = ours <= rsync if goal else None
    return Figure(what, ours, "s", {"rsync": rsync}, goal, met, note)


def _reset_peak(pid: int) -> int:
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _peak(pid)


def _peak(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
