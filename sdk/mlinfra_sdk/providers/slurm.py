"""``on=slurm``: a job of a Slurm cluster, here or behind ``ssh`` to a login node.

The job's batch script becomes the agent (``worker/spawner.py``), so the job ends when the agent
does; its time limit is the hard stop. Commands run in it by ``srun --overlap``. The user's home
directory must be the same on the login node and on the nodes, as it is on most clusters.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import ClassVar

import anyio
import msgspec

from mlinfra_sdk import units
from mlinfra_sdk.catalog import catalog
from mlinfra_sdk.catalog.gpus import ANY, Gpu
from mlinfra_sdk.errors import LinkError, ProviderError, RequestError
from mlinfra_sdk.ledger import Price
from mlinfra_sdk.link.processes import open_process
from mlinfra_sdk.link.wire import ProcessWire
from mlinfra_sdk.providers.base import Capabilities, Handle, Offer, Problem, Status, longest
from mlinfra_sdk.providers.remote import (
    ExecProvider,
    ExecWire,
    Remote,
    ask,
    find,
    shell,
)
from mlinfra_sdk.providers.ssh import Options as SshOptions
from mlinfra_sdk.providers.ssh import SshProvider, SshRemote
from mlinfra_sdk.providers.waiting import runs, tell
from mlinfra_sdk.spec import Request
from mlinfra_sdk.worker import spawner

_NAME = "mlinfra"
_LONGEST = 8 * 3600
"""Seconds that a job may take if neither ``time=`` nor the partition says less."""
_UNCLAIMED = 900
"""Seconds after which a job ends that nobody has given an agent."""
_NOTICE = 60
"""Seconds before its time limit at which the agent is told to end."""
_SHORTEST = 3
"""Minutes of the shortest limit: Slurm's signal may come two before it, and an idle agent ends with
that, which would be before its own time."""
_SUBMITTING = 60.0
"""Seconds that `sbatch` may take."""
_START_SECONDS = 5.0
_WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD"})
_ENDS = {
    "TIMEOUT": "its time limit in Slurm was reached",
    "PREEMPTED": "Slurm gave its node to a job of higher priority",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "the job used more memory than it was given",
    "CANCELLED": "the job was cancelled",
    "DEADLINE": "its deadline in Slurm was reached",
}
_FORCED = frozenset(_ENDS) - {"CANCELLED"}
"""Of these the agent knows at most that it was told to stop."""


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a target: the login node as ``ssh`` knows it (``host``; without one Slurm's commands are
    here), ``partition``, ``account`` and ``qos`` of its jobs, ``cpus`` and ``memory`` (as
    ``--mem`` takes it) for each, more words for ``sbatch`` (``extra``), and where to keep
    everything (``home``) and which ``python`` to use on its nodes."""

    host: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    cpus: int = 0
    memory: str = ""
    extra: list[str] = []
    home: str = ""
    python: str = ""


class _Here(Remote):
    where = "slurm"

    async def exec(self, argv: Sequence[str]) -> ProcessWire:
        return await open_process(argv)

    def interactive(self, argv: Sequence[str]) -> list[str]:
        return list(argv)


class SlurmRemote(Remote):
    """Commands inside of a job."""

    def __init__(self, login: Remote, job: str, pipe: str) -> None:
        self.where = f"the Slurm job {job}"
        self._login = login
        self._job = job
        self._pipe = pipe

    async def exec(self, argv: Sequence[str]) -> ExecWire:
        """As a step beside the batch script's, on its node."""
        step = ["srun", f"--jobid={self._job}", "--overlap", "--nodes=1", "--ntasks=1"]
        step += ["--unbuffered", "--quiet", "--mpi=none"]
        return await self._login.exec([*step, "env", f"{spawner.VARIABLE}={self._pipe}", *argv])

    def interactive(self, argv: Sequence[str]) -> list[str]:
        """As a step with a terminal."""
        step = ["srun", f"--jobid={self._job}", "--overlap", "--nodes=1", "--ntasks=1", "--pty"]
        return self._login.interactive([*step, "--quiet", "--mpi=none", *argv])


class _Gres(msgspec.Struct, frozen=True):
    """GPUs that nodes of a partition have: by Slurm's name for them, and by ours."""

    partition: str
    kind: str
    count: int
    name: str
    longest: float


class SlurmProvider(ExecProvider):
    """Jobs of a cluster."""

    name: ClassVar[str] = "slurm"
    capabilities = Capabilities(hard_stop="provider", rented=False)
    options: ClassVar[type[msgspec.Struct]] = Options
    argument: ClassVar[str] = "host"
    grace: ClassVar[float] = _NOTICE - 2.0

    def __init__(self, options: Options | None = None) -> None:
        self._options = options or Options()

    def check(self) -> list[Problem]:
        """Whether Slurm's commands are here, or the login node lets us in."""
        if self._options.host:
            return SshProvider(SshOptions(host=self._options.host)).check()
        if shutil.which("sbatch") is None or shutil.which("srun") is None:
            return [
                Problem(
                    "There is no Slurm here.",
                    "For a cluster behind ssh write on=slurm:LOGIN, or host= in a target.",
                )
            ]
        return []

    def remote(self, data: Mapping[str, str]) -> Remote:
        """Commands run in the job."""
        return SlurmRemote(_login(data["host"]), data["job"], data["pipe"])

    async def offers(self, request: Request) -> list[Offer]:
        """What the partitions have; the start is what Slurm estimates."""
        login = _login(self._options.host)
        found = await _gres(login, self._options.partition)
        price = self._price(request)
        if request.gpu is None:
            start = await self._expected_start(login, request, None)
            return [Offer(self.name, None, price, start)]
        offers = []
        for wish in request.gpu.alternatives:
            gres = _fitting(wish, found)
            if gres is not None:
                start = await self._expected_start(login, request, (gres, wish.count))
                offers.append(Offer(self.name, Gpu(gres.name, wish.count), price, start))
        if not offers:
            have = ", ".join(sorted({f"{it.name}:{it.count}" for it in found})) or "no GPUs"
            raise RequestError(
                f"gpu={request.gpu} cannot be met by on={self._where}: its nodes have {have}.",
                hint="Ask for one of these, or name a partition that has it.",
            )
        return offers

    @staticmethod
    def _price(request: Request) -> Price:
        source = "set by price=" if request.price else "your own cluster"
        return Price(request.price, source, time.strftime("%Y-%m-%d"))

    @property
    def _where(self) -> str:
        return f"slurm:{self._options.host}" if self._options.host else "slurm"

    async def launch(
        self, offer: Offer, request: Request, key: str, previous: Handle | None = None
    ) -> Handle:
        """Submit a job, wait until it runs, and start an agent in it; see
        :meth:`Provider.launch`."""
        login = _login(self._options.host)
        job = (await _jobs(login)).get(key)
        if job is None:
            gres = None
            if offer.gpu is not None:
                found = _fitting(offer.gpu, await _gres(login, self._options.partition))
                gres = (found, offer.gpu.count) if found is not None else None
            job = await self._submit(login, request, key, gres)
        try:
            first = (await _jobs(login)).get(key, job)
            if first != job:  # another launch of this key was quicker
                await _cancel(login, job)
                job = first
            await _until_running(login, job)
            data = {"host": self._options.host, "job": job, "pipe": _pipe(key, job)}
            return await self.start_agent(
                data,
                request,
                key,
                previous,
                home=self._options.home,
                python=self._options.python,
            )
        except BaseException:
            with anyio.CancelScope(shield=True):
                await _cancel(login, job)
            raise

    def _minutes(self, request: Request, gres: tuple[_Gres, int] | None) -> int:
        """The job's time limit."""
        seconds = longest(request, self._price(request))
        if seconds is None:
            return math.ceil(min(_LONGEST, gres[0].longest if gres else _LONGEST) / 60)
        return max(_SHORTEST, math.ceil(seconds / 60))

    def _arguments(self, request: Request, gres: tuple[_Gres, int] | None) -> list[str]:
        options = self._options
        partition = options.partition or (gres[0].partition if gres else "")
        minutes = self._minutes(request, gres)
        named = {
            "job-name": _NAME,
            "output": "/dev/null",
            "nodes": "1",
            "time": str(minutes),
            "signal": f"B:TERM@{_NOTICE}",
            "partition": partition,
            "account": options.account,
            "qos": options.qos,
            "cpus-per-task": str(options.cpus or ""),
            "mem": options.memory,
            "gres": f"gpu:{gres[0].kind}:{gres[1]}".replace("::", ":") if gres else "",
        }
        given = [f"--{name}={value}" for name, value in named.items() if value]
        return [*given, "--no-requeue", *options.extra]

    async def _submit(
        self, login: Remote, request: Request, key: str, gres: tuple[_Gres, int] | None
    ) -> str:
        arguments = [*self._arguments(request, gres), f"--comment={key}", "--parsable"]
        # Older Slurms do not tell a job its end, by which the agent knows what a signal means.
        seconds = 60 * self._minutes(request, gres)
        end = (
            f': "${{SLURM_JOB_END_TIME:=$(($(date +%s) + {seconds}))}}"; export SLURM_JOB_END_TIME'
        )
        shebang, *rest = spawner.script(_pipe(key, "$SLURM_JOB_ID"), _UNCLAIMED)
        lines = [shebang, end, *rest]
        command = f"printf '%s\\n' {shlex.join(lines)} | {shlex.join(['sbatch', *arguments])} 2>&1"
        said: list[str] = []
        # Cut off in its midst, it may leave a job that nobody knows of.
        with anyio.move_on_after(_SUBMITTING, shield=True) as limit:
            said = await shell(login, command)
        if limit.cancelled_caught:
            raise ProviderError(
                f"Slurm has not taken the job within {_SUBMITTING:.0f} s.",
                hint="If it does so later, the next session or `mlinfra sweep` ends that job.",
            )
        # Job submission plug-ins may say more before it.
        match = re.fullmatch(r"(\d+)(;.*)?", said[-1]) if said else None
        if match is None:
            raise ProviderError(
                f"Slurm did not take the job: {' '.join(said).removeprefix('sbatch: error: ')}",
                hint="Check partition, account and time= of the target with your cluster's rules.",
            )
        return match[1]

    async def _expected_start(
        self, login: Remote, request: Request, gres: tuple[_Gres, int] | None
    ) -> float:
        """Seconds until Slurm expects to start such a job."""
        arguments = shlex.join(["sbatch", "--test-only", *self._arguments(request, gres)])
        said = " ".join(
            await shell(login, f"{arguments} --wrap=true 2>&1; date +%Y-%m-%dT%H:%M:%S")
        )
        times = re.findall(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", said)
        if len(times) < 2:
            return _START_SECONDS
        start, now = (datetime.fromisoformat(text) for text in (times[0], times[-1]))
        return max(0.0, (start - now).total_seconds()) + _START_SECONDS

    async def status(self, handle: Handle) -> Status:
        """As Slurm tells; why an agent ended, it has written down itself."""
        try:
            state, reason = await _state(_login(handle.data["host"]), handle.data["job"])
        except LinkError as error:
            return Status(True, f"it cannot be asked: {error.message}")
        if state in _WAITING or state in ("RUNNING", "SUSPENDED", "STOPPED"):
            return Status(True)
        told = await self._told(handle)
        ended_at = told.ended_at if told is not None else None
        if told is not None and ended_at is not None and state not in _FORCED:
            return told
        words = _ENDS.get(state, f"the job ended as {state or 'unknown'}")
        said = f"{words} ({reason})" if reason not in ("", "None") else words
        return Status(False, said, ended_at)

    async def _told(self, handle: Handle) -> Status | None:
        login = _login(handle.data["host"])
        with suppress(LinkError, ProviderError):
            return (await ask(login, handle.data, "status", Status, handle.key)).here()
        return None

    async def stop(self, handle: Handle) -> None:
        """End the job, and remove what the machine has left in the home directory, unless runs
        wait there to be collected."""
        login = _login(handle.data["host"])
        await _cancel(login, handle.data["job"])
        if handle.data.get("python"):
            with suppress(ProviderError):
                await ask(login, handle.data, "stop", type(None), handle.key)

    async def remains(self) -> list[Handle]:
        """Folders in the home directory whose jobs are over, with runs to be collected."""
        login = _login(self._options.host)
        data = await find(login, self._options.home)
        if data is None:
            return []
        alive = await _jobs(login)
        _, ended = await ask(login, data, "machines", tuple[list[str], list[str]])
        return [self._handle(key, "", data) for key in ended if key not in alive]

    async def list(self) -> list[Handle]:
        """Our jobs that wait or run."""
        login = _login(self._options.host)
        jobs = await _jobs(login)
        data = await find(login, self._options.home) if jobs else None
        return [self._handle(key, job, data or {}) for key, job in jobs.items()]

    def _handle(self, key: str, job: str, data: Mapping[str, str]) -> Handle:
        own = {"host": self._options.host, "job": job, "pipe": _pipe(key, job)}
        return Handle(self.name, key, {**own, **data})


def _login(host: str) -> Remote:
    return SshRemote(host) if host else _Here()


def _pipe(key: str, job: str) -> str:
    """On the node's own disk. Nobody can guess the key, so nobody else has made it; two jobs of
    one key, of which one is going to be cancelled, may meet there."""
    return f"/tmp/mlinfra-{key}-{job}"


async def _jobs(login: Remote) -> dict[str, str]:
    """Our jobs that wait or run, by key; the first one of each."""
    lines = await shell(login, f"squeue --me --noheader --name={_NAME} --format='%i %k'")
    pairs = (line.split() for line in lines)
    jobs = [(int(pair[0]), pair[1]) for pair in pairs if len(pair) == 2 and pair[0].isdigit()]
    return {key: str(job) for job, key in sorted(jobs, reverse=True)}


async def _state(login: Remote, job: str) -> tuple[str, str]:
    """Slurm's word for the state of a job, and its reason; empty when it is forgotten."""
    show = f"scontrol show job {job} --oneliner 2>/dev/null || true"
    text = " ".join(await shell(login, show))
    if not text:
        text = " ".join(await shell(login, f"sacct -X -n -P -o State -j {job} 2>/dev/null || true"))
        return text.split(" ")[0], ""
    found = dict(re.findall(r"\b(JobState|Reason|PreemptTime)=(\S+)", text))
    state = found.get("JobState", "")
    if state == "COMPLETING" and found.get("PreemptTime", "None") not in ("None", "N/A"):
        state = "PREEMPTED"
    return state, found.get("Reason", "")


async def _until_running(login: Remote, job: str) -> None:
    """Wait in the queue, and tell the place in it. Raises :class:`ProviderError` if the job ends
    there."""
    pause = 0.2
    while True:
        state, reason = await _state(login, job)
        if state == "RUNNING":
            runs()
            return
        if state not in _WAITING:
            raise ProviderError(
                f"The Slurm job {job} ended before it began: {state or 'it is gone'} ({reason}).",
                hint="Try again, or ask for what the cluster has: `sinfo`.",
            )
        if reason in ("PartitionTimeLimit", "QOSMaxWallDurationPerJobLimit"):
            raise ProviderError(
                f"The Slurm job {job} can never start: {reason}.", hint="Ask for less by time=."
            )
        tell(await _place_in_queue(login, job, reason) if state == "PENDING" else "the node boots")
        await anyio.sleep(pause)
        pause = min(pause * 1.5, 10)


async def _place_in_queue(login: Remote, job: str, reason: str) -> str:
    """``queued at Slurm, position 3 of 7 (Resources); Slurm expects it to start in 12 min``.

    Jobs that wait in its partition are counted by priority, as far as this user may see them."""
    lines = await shell(
        login,
        f"p=$(squeue --noheader --jobs={job} --format=%P); squeue --noheader --states=PENDING"
        ' --partition="$p" --sort=-p,i --format=%A; echo -; squeue --noheader --start'
        f" --jobs={job} --format=%S; echo -; date +%Y-%m-%dT%H:%M:%S",
    )
    if lines.count("-") != 2:
        return f"queued at Slurm ({reason})"
    cut = lines.index("-")
    queue, start, now = lines[:cut], lines[cut + 1 : -2], lines[-1]
    place = f", position {queue.index(job) + 1} of {len(queue)}" if job in queue else ""
    why = f" ({reason})" if reason not in ("", "None") else ""
    expected = ""
    with suppress(ValueError, IndexError):  # N/A, as long as Slurm has not planned it
        seconds = (datetime.fromisoformat(start[0]) - datetime.fromisoformat(now)).total_seconds()
        if seconds > 0:
            expected = f"; Slurm expects it to start in {units.format_duration(seconds)}"
    return f"queued at Slurm{place}{why}{expected}"


async def _cancel(login: Remote, job: str) -> None:
    """End a job and wait until it is over. No error for one that is."""
    if not job:
        return
    # What cancels a job sends SIGTERM, which would be an agent's notice of a preemption.
    if (await _state(login, job))[0] == "RUNNING":
        await shell(login, f"scancel --batch --signal=INT {job} 2>/dev/null || true")
    await shell(login, f"scancel {job} 2>/dev/null || true")
    while (await _state(login, job))[0] in (*_WAITING, "RUNNING", "COMPLETING", "SUSPENDED"):
        await anyio.sleep(0.2)


async def _gres(login: Remote, partition: str) -> list[_Gres]:
    """The GPUs of the partitions, most of one kind on a node."""
    chosen = f"--partition={shlex.quote(partition)}" if partition else ""
    lines = await shell(login, f"sinfo --noheader {chosen} --format='%R|%G|%l|%a'")
    best: dict[tuple[str, str], _Gres] = {}
    for line in lines:
        fields = line.split("|")
        if len(fields) != 4 or fields[3].strip() != "up":
            continue
        name, text, limit = fields[:3]
        for match in re.finditer(r"gpu(?::([A-Za-z0-9._-]*[A-Za-z][A-Za-z0-9._-]*))?:(\d+)", text):
            kind, count = match[1] or "", int(match[2])
            ours = catalog().canonical(kind.replace("_", "-")) or kind or ANY
            known = best.get((name, kind))
            if known is None or known.count < count:
                best[name, kind] = _Gres(name, kind, count, ours, _seconds(limit))
    return list(best.values())


def _seconds(limit: str) -> float:
    """``1-12:00:00``, ``30:00`` or ``infinite`` as seconds."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", limit.strip())
    if match is None:
        return float("inf")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(units.parse_duration(f"{days}d{hours}h{minutes}m{seconds}s"))


def _fitting(wish: Gpu, found: Sequence[_Gres]) -> _Gres | None:
    """Those nodes' GPUs that meet the wish, or may: a cluster need not name them. What was really
    given is checked on the machine."""
    for gres in found:
        if gres.count >= wish.count and gres.kind and wish.met_by(Gpu(gres.name, wish.count)):
            return gres
    return next((it for it in found if not it.kind and it.count >= wish.count), None)
