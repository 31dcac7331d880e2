"""A real Slurm of one node on this machine, with two pretended GPUs, for tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from processes import free_ports, until

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")


def missing() -> list[str]:
    """Programs of Slurm that are not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class Cluster:
    """The daemons in ``root``. ``env`` makes Slurm's commands talk to them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = {"SLURM_CONF": str(root / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start munged, slurmctld and slurmd, and wait until the node is idle."""
        self.root.chmod(0o755)
        for name in ("state", "spool", "munge"):
            (self.root / name).mkdir()
        for name in ("gpu0", "gpu1"):
            (self.root / name).touch()
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = self.root / "munge"
        (self.root / "slurm.conf").write_text(self._configuration())
        (self.root / "gres.conf").write_text(
            f"Name=gpu Type=a10 File={self.root}/gpu0\nName=gpu Type=a10 File={self.root}/gpu1\n"
        )
        self._run(
            "munged",
            "--foreground",
            "--force",
            f"--socket={munge}/socket",
            f"--key-file={key}",
            f"--pid-file={munge}/pid",
            f"--log-file={munge}/log",
            f"--seed-file={munge}/seed",
        )
        until((munge / "socket").exists, "munged")
        self._run("slurmctld", "-D", "-f", self.env["SLURM_CONF"])
        self._run("slurmd", "-D", "-f", self.env["SLURM_CONF"])
        until(lambda: "idle" in self.command("sinfo", "-h", "-o", "%T"), "the node")

    def _configuration(self) -> str:
        host = socket.gethostname().split(".")[0]
        ports = free_ports(2)
        socket_path = self.root / "munge" / "socket"
        lines = (
            "ClusterName=tests",
            f"SlurmctldHost={host}(127.0.0.1)",
            "SlurmUser=root",
            "AuthType=auth/munge",
            f"AuthInfo=socket={socket_path}",
            "CredType=cred/munge",
            f"SlurmctldPort={ports[0]}",
            f"SlurmdPort={ports[1]}",
            f"StateSaveLocation={self.root}/state",
            f"SlurmdSpoolDir={self.root}/spool",
            f"SlurmctldPidFile={self.root}/slurmctld.pid",
            f"SlurmdPidFile={self.root}/slurmd.pid",
            f"SlurmctldLogFile={self.root}/slurmctld.log",
            f"SlurmdLogFile={self.root}/slurmd.log",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "MpiDefault=none",
            "ReturnToService=2",
            "GresTypes=gpu",
            "SchedulerParameters=batch_sched_delay=0",
            "SlurmctldParameters=preempt_send_user_signal",
            "KillWait=5",
            "MinJobAge=300",
            "InactiveLimit=0",
            "SwitchType=switch/none",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            f"NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=4000"
            " Gres=gpu:a10:2",
            f"PartitionName=main Nodes={host} Default=YES MaxTime=1-00:00:00 State=UP"
            " OverSubscribe=FORCE:4 PriorityTier=1 GraceTime=5",
            f"PartitionName=urgent Nodes={host} MaxTime=1-00:00:00 State=UP PriorityTier=2",
        )
        return "\n".join(lines) + "\n"

    def command(self, *argv: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            argv, env={**os.environ, **self.env}, capture_output=True, text=True, check=False
        )
        return done.stdout

    def _run(self, *argv: str) -> None:
        env = {**os.environ, **self.env, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        with open(self.root / f"{argv[0]}.out", "wb") as out:
            self._daemons.append(subprocess.Popen(argv, env=env, stdout=out, stderr=out))

    def stop(self) -> None:
        """End all jobs and the daemons."""
        self.command("scancel", "--me")
        with suppress(AssertionError):
            until(lambda: not self.command("squeue", "-h"), "jobs to end", patience=15)
        for daemon in reversed(self._daemons):
            with suppress(psutil.NoSuchProcess):
                family = [*psutil.Process(daemon.pid).children(recursive=True)]
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                for process in family:
                    with suppress(psutil.NoSuchProcess):
                        process.kill()


@contextmanager
def slurm() -> Iterator[Cluster]:
    """A running cluster."""
    root = Path(tempfile.mkdtemp(prefix="mlinfra-slurm-"))
    cluster = Cluster(root)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(root, ignore_errors=True)
