"""Cuts and kills: nothing is lost, doubled or corrupted, nobody hangs, nothing is left behind.

The long version, with hundreds of seeds, is ``python -m benchmarks.chaos``.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy
import pytest
from chaos import Net, Plan, net, random_cuts
from faulty import Client, Recorder, Work, agents, client, kernels, processes
from live import until

from mlinfra_sdk import targets
from mlinfra_sdk.errors import (
    KernelDied,
    MachineLost,
    RemoteValueLost,
    RequestError,
    RunCancelled,
    RunDetached,
)
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.link.state import Timing
from mlinfra_sdk.worker import agent as agent_module
from mlinfra_sdk.worker import host
from mlinfra_sdk.worker.journal import Journal

SLEEP = "import time\nprint('on', flush=True)\nwhile True: time.sleep(0.01)"


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A state directory; in the end nothing may run, wait or be open in it."""
    folder = Path(tempfile.mkdtemp(prefix="mlinfra-faults-"))  # sockets need a short path
    before = os.environ.get("MLINFRA_HOME")
    os.environ["MLINFRA_HOME"] = str(folder)
    try:
        yield folder
        until(lambda: not processes(folder), "processes to end", lambda: processes(folder))
        assert list((folder / "machines").iterdir()) == []
        ledger = Ledger.open()
        assert [run for run in ledger.runs() if run.seconds is None] == []
        ledger.close()
    finally:
        for process in processes(folder):
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)
        os.environ.pop("MLINFRA_HOME")
        if before is not None:
            os.environ["MLINFRA_HOME"] = before


@pytest.fixture(scope="module")
def path(home: Path) -> Iterator[Net]:
    """The path between clients and agents. Its provider comes while the process runs, as one
    that is installed from a notebook."""
    targets.installed()
    with net(home / "net") as it:
        yield it


@pytest.fixture(scope="module")
def distant(path: Net) -> Iterator[Client]:
    """A client of a machine that shares nothing with this one."""
    with client(on="chaos", isolate=True) as it:
        it.run("import numpy")
        yield it


@pytest.fixture
def alone(path: Net, home: Path) -> Iterator[Callable[..., Client]]:
    """Makes clients of a test's own, whose machines are stopped after it."""
    made: list[Client] = []

    def make(**settings: object) -> Client:
        made.append(Client(settings.pop("request", None) or _request(**settings)))
        return made[-1]

    path.up()
    yield make
    path.up()
    for it in made:
        it.session.stop()
    # Runs of a machine with a name would be found by the next test, or by this one's second try.
    left = host.remains(home / "machines")
    for folder in left:
        shutil.rmtree(folder)
    assert left == []


def _request(**settings: object) -> object:
    from mlinfra_sdk.spec import Request

    return Request(**({"on": "chaos", "env": "none", "sync": False} | settings))


def journals(home: Path) -> list[Path]:
    return list(home.glob("machines/*/runs/*"))


def size(file: Path) -> int:
    """Its bytes; 0 once it is gone."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def in_background(function: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Call it in a thread; the list gets what it gives or raises."""
    found: list[object] = []

    def call() -> None:
        try:
            found.append(function())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread, found


def ended(thread: threading.Thread, limit: float = 60) -> None:
    thread.join(limit)
    assert not thread.is_alive(), "it hangs"


# -- cuts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_outputs_come_once_and_in_order_over_cuts(
    path: Net, distant: Client, home: Path, seed: int
) -> None:
    work, recorder = Work(5000, pause=0.004), Recorder()
    before = path.proxy.cuts
    path.plan(random_cuts(seed, 25, 1 << 18))
    path.cut()
    distant.run(work.code, recorder)
    assert work.problems(recorder.records) == []
    assert distant.namespace["work_total"] == work.total
    assert path.proxy.cuts - before >= 2
    until(lambda: not journals(home), "the journal to go")


@pytest.mark.parametrize("seed", range(3))
def test_arrays_arrive_whole_over_cuts(path: Net, distant: Client, seed: int) -> None:
    original = numpy.random.default_rng(seed).standard_normal(2_500_000)
    array = distant.namespace["array"] = original.copy()
    before = path.proxy.cuts
    path.plan(random_cuts(seed, 25, 1 << 23))
    path.cut()
    distant.run("array += 1\nhalf = array[::2].copy()")
    assert distant.namespace["array"] is array
    assert numpy.array_equal(array, original + 1)
    assert numpy.array_equal(distant.namespace["half"], (original + 1)[::2])
    assert path.proxy.cuts - before >= 2


def test_half_open_connections_are_found(
    path: Net, alone: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections that fall silent without an end, at once and after a while."""
    quick = partial(Timing, heartbeat=0.1, dead_after=0.6, handshake=1.0)
    monkeypatch.setattr("mlinfra_sdk.machines.client.Timing", quick)
    it = alone(isolate=True)
    it.run("1")
    source = random.Random(0)
    lengths = [int(200_000 ** source.random()) for _ in range(5)]
    path.plan(
        lambda number: (
            Plan((lengths[number],) * 2, half_open=True) if number < len(lengths) else Plan()
        )
    )
    path.cut()
    work, recorder = Work(3000, pause=0.02), Recorder()
    it.run(work.code, recorder)
    assert work.problems(recorder.records) == []
    assert "reconnecting" in recorder.phases


def test_a_run_that_is_cut_off_for_too_long_is_brought_back(
    path: Net, alone: Callable[..., Client]
) -> None:
    it = alone(isolate=True, reconnect=0.5)
    it.run("hidden = (n for n in range(9))")
    work, recorder = Work(2000, pause=0.1), Recorder()
    thread, found = in_background(lambda: it.run(work.code, recorder))
    until(lambda: len(recorder.records) > 5, "outputs")
    path.down()
    ended(thread)
    (error,) = found
    assert isinstance(error, RunDetached)
    assert recorder.run in str(error)
    path.up()
    again = Recorder()
    it.session.attach(recorder.run, frontend=again)
    assert work.problems(again.records) == []
    assert it.namespace["work_total"] == work.total
    assert it.session.runs() == []
    # It is the same kernel, with what lives there only.
    assert it.run("next(hidden), work_total").value == (0, work.total)


def test_the_card_tells_that_it_reconnects(path: Net, alone: Callable[..., Client]) -> None:
    it = alone(isolate=True)
    it.run("1")
    recorder = Recorder()
    work = Work(1500, pause=0.2)
    thread, _ = in_background(lambda: it.run(work.code, recorder))
    until(lambda: len(recorder.records) > 5, "outputs")
    path.down()
    until(lambda: "reconnecting" in recorder.phases, "the card to tell it")
    path.up()
    ended(thread)
    assert recorder.phases[-1] == "running"
    assert work.problems(recorder.records) == []


# -- the client is killed --------------------------------------------------------------------

DYING = """
import os, signal, subprocess, sys, threading
from faulty import Client, Recorder, Work
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.providers.local import LocalProvider
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

class Dying(Recorder):
    starts = 0
    def phase(self, phase):
        if phase == "start":
            self.starts += 1
            if where == "opening a kernel" and self.starts == 2:
                threading.Timer(0.05, die).start()
        if where == phase == "data":
            threading.Timer(0.05, die).start()
    def publish(self, record):
        super().publish(record)
        if where == "running" and len(self.records) == 40:
            die()

where = sys.argv[1]
if where == "intended":
    LocalProvider.launch = die
if where == "launched":
    start = subprocess.Popen
    subprocess.Popen = lambda *args, **kwargs: (start(*args, **kwargs), die())
if where == "ready":
    Ledger.machine_started = die
it = Client(Request(on="chaos", isolate=True, env="none", machine="m"))
if where in ("data", "running", "result", "collecting"):
    it.run("1")
if where == "result":
    Session._finish = die
if where == "collecting":
    apply = it.session._local.apply
    it.session._local.apply = lambda outputs: (apply(outputs), die())
if where == "data":
    it.namespace["big"] = os.urandom(200_000_000)
work = Work(4000, pause=0.01, extra="big = len(big)" if where == "data" else "")
it.run(work.code, Dying())
"""
BEFORE_ITS_RUN = ["intended", "launched", "ready", "opening a kernel", "data"]
SINCE_ITS_RUN = ["running", "result", "collecting"]


@pytest.mark.parametrize("where", BEFORE_ITS_RUN + SINCE_ITS_RUN)
def test_the_client_is_killed(
    path: Net, alone: Callable[..., Client], home: Path, where: str
) -> None:
    script = home / "dying.py"
    script.write_text(DYING)
    done = subprocess.run([sys.executable, str(script), where], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    it = alone(isolate=True, machine="m")
    work = Work(4000, pause=0.01)
    runs = it.session.runs()
    recorder = Recorder()
    if where in BEFORE_ITS_RUN:
        assert runs == []
        it.run(work.code, recorder)
    else:
        (info,) = runs
        it.session.attach(info.run, frontend=recorder)
    assert work.problems(recorder.records) == []
    assert it.namespace["work_total"] == work.total
    assert it.session.runs() == []
    until(lambda: not journals(home), "the journal to go")
    # One, and that of the module's own client; an agent that nobody knows ends by itself.
    until(lambda: len(agents(home)) <= 2, "agents to end", lambda: agents(home))


def test_processes_that_ask_for_one_name_at_once_get_one_machine(
    alone: Callable[..., Client], home: Path
) -> None:
    script = (
        "import sys\nfrom faulty import Client\nfrom mlinfra_sdk.spec import Request\n"
        "it = Client(Request(on='chaos', machine='one'))\nprint(flush=True)\nsys.stdin.readline()\n"
        "it.run('1')\nprint(it.session.machine.id, flush=True)\nsys.stdin.readline()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", script], **pipes) for _ in range(4)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    machines = {process.stdout.readline() for process in processes}
    it = alone(machine="one")
    it.run("1")
    assert machines == {it.session.machine.id + "\n"}
    for process in processes:
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
    assert list((home / "claims").iterdir()) == []


# -- the agent is killed ---------------------------------------------------------------------


def test_the_agent_is_killed(alone: Callable[..., Client], home: Path) -> None:
    it = alone(isolate=True)
    it.run("left = (n for n in range(9))")
    work = Work(100_000, pause=0.01)
    mine = set(agents(home))
    handle = it.start(work.code, label="train")
    until(lambda: (handle.info() or 0) and handle.info().messages > 50, "messages")
    thread, _ = in_background(
        lambda: it.session.watch("train", lambda record: None, until_end=True)
    )
    agent = next(one for one in mine if str(it.session.machine.id) in " ".join(one.cmdline()))
    agent.kill()
    ended(thread)
    # A machine of the same name takes over what is left.
    recorder = Recorder()
    with pytest.raises(MachineLost):
        it.session.attach("train", frontend=recorder)
    assert len(recorder.records) > 50
    assert [record.number for record in recorder.records] == [*range(1, len(recorder.records) + 1)]
    assert "".join(f"work {n}\n" for n in range(work.lines)).startswith(recorder.text)
    assert it.session.runs() == []
    with pytest.raises(RemoteValueLost):
        next(it.namespace["left"])
    assert it.run("1 + 1").value == 2


def test_the_journal_is_cut_at_any_byte(
    alone: Callable[..., Client], home: Path, tmp_path: Path
) -> None:
    """As a power cut leaves it: what is whole is shown, and the run has an end."""
    it = alone(isolate=True, machine="cut")
    handle = it.start(Work(1000, extra=SLEEP).code, label="train")
    until(lambda: (info := handle.info()) and info.messages >= 25, "messages")
    folder = Path(it.session.machine.handle.data["folder"])
    next(one for one in agents(home) if str(folder) in one.cmdline()).kill()
    until(lambda: not [one for one in kernels(home) if one.ppid() == 1], "its kernel to end")
    (segment,) = folder.glob("runs/*/*.records")
    whole = segment.read_bytes()
    source = random.Random(0)
    for cut in [0, 1, 7, 8, 9, *(source.randrange(len(whole)) for _ in range(20))]:
        copy = tmp_path / f"cut{cut}"
        shutil.copytree(segment.parent, copy / "run1")
        (copy / "run1" / segment.name).write_bytes(whole[:cut])
        (run,) = agent_module.Runs(copy)._runs.values()
        assert run.info.status == "lost" and run.info.label == "train"
        kept = run.journal.last - 1  # and the end
        assert Journal.recover(copy / "run1").last == kept + 1
        assert len(whole[:cut]) >= sum(
            8 + len(item) for item in list(run.journal.reader().read())[:kept]
        )
    os.truncate(segment, len(whole) * 2 // 3)
    recorder = Recorder()
    with pytest.raises(MachineLost):
        it.session.attach("train", frontend=recorder)
    # The last message may end within a line.
    assert recorder.text and "".join(f"work {n}\n" for n in range(1000)).startswith(recorder.text)


def test_what_an_agent_that_ends_leaves_can_be_collected(alone: Callable[..., Client]) -> None:
    it = alone(isolate=True, machine="ends", idle=1.0)
    work = Work(500)
    it.start(work.code, label="train")
    machine = it.session.machine
    until(lambda: not agents_of(machine), "the machine's end by its limit")
    recorder = Recorder()
    it.session.configure(_request(isolate=True, machine="ends"))
    it.session.attach("train", frontend=recorder)
    assert work.problems(recorder.records) == []
    assert it.namespace["work_total"] == work.total


def agents_of(machine: object) -> list[object]:
    folder = str(machine.handle.data["folder"])  # type: ignore[attr-defined]
    return [one for one in agents(Path(os.environ["MLINFRA_HOME"])) if folder in one.cmdline()]


# -- the kernel is killed --------------------------------------------------------------------


def test_the_kernel_is_killed_with_runs_waiting(alone: Callable[..., Client], home: Path) -> None:
    it = alone()
    it.run("import os; pid = os.getpid(); left = (n for n in range(3))")
    first = it.start(SLEEP, label="first")
    others = [it.start(f"n{i} = 1", label=f"other{i}") for i in range(3)]
    until(lambda: first.info().messages, "its output")
    os.kill(it.namespace["pid"], signal.SIGKILL)
    for handle in [first, *others]:
        recorder = Recorder()
        until(handle.done, "its end")
        with pytest.raises(KernelDied, match="SIGKILL"):
            it.session.attach(handle.name, frontend=recorder)
    assert it.session.runs() == []
    with pytest.raises(RemoteValueLost):
        next(it.namespace["left"])
    assert it.run("1 + 1").value == 2
    assert it.namespace.get("n1") is None


def test_a_kernel_that_nobody_follows_dies(alone: Callable[..., Client]) -> None:
    """The next run notices nothing of it."""
    it = alone()
    handle = it.start("import os; os._exit(3)", label="gone")
    until(handle.done, "its end")
    assert it.run("1 + 1").value == 2
    with pytest.raises(KernelDied, match="status 3"):
        it.session.attach("gone")
    assert it.run("2 + 2").value == 4


def test_everything_that_was_printed_before_a_death_is_shown(
    alone: Callable[..., Client],
) -> None:
    it = alone()
    recorder = Recorder()
    with pytest.raises(KernelDied):
        it.run(
            "import os, sys, time\nfor n in range(20_000): print('line', n)\n"
            "sys.stdout.flush()\ntime.sleep(0.3)\nos._exit(1)",
            recorder,
        )
    assert recorder.text == "".join(f"line {n}\n" for n in range(20_000))


# -- who is slow, or away --------------------------------------------------------------------


@pytest.mark.timeout(180)
def test_the_slow_are_not_taken_for_dead(alone: Callable[..., Client], home: Path) -> None:
    """A kernel that holds the GIL, and an agent that is suspended for less, or for more, than a
    link waits: side by side, since each takes its time."""
    clients = [alone(isolate=True) for _ in range(3)]
    for it in clients:
        it.run("1")

    def hold() -> object:
        code = "import ctypes\nctypes.PyDLL(None).sleep(20)\nprint('awake')"
        recorder = Recorder()
        clients[0].run(code, recorder)
        return recorder.text, "reconnecting" in recorder.phases

    def suspend(it: Client, seconds: float) -> object:
        (agent,) = agents_of(it.session.machine)
        recorder = Recorder()
        work = Work(3000, pause=0.1)
        thread, _ = in_background(lambda: it.run(work.code, recorder))
        until(lambda: len(recorder.records) > 5, "outputs")
        agent.suspend()
        time.sleep(seconds)
        agent.resume()
        ended(thread, 90)
        return work.problems(recorder.records), "reconnecting" in recorder.phases

    jobs = [
        in_background(hold),
        in_background(lambda: suspend(clients[1], 5)),
        in_background(lambda: suspend(clients[2], 20)),
    ]
    for thread, _ in jobs:
        ended(thread, 120)
    assert [found for _, found in jobs] == [[("awake\n", False)], [([], False)], [([], True)]]


def test_a_flood_that_nobody_follows_stays_within_the_limit(
    alone: Callable[..., Client], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 4 << 20
    monkeypatch.setattr(
        "mlinfra_sdk.providers.local.Config", partial(agent_module.Config, journal_limit=limit)
    )
    it = alone(isolate=True)
    handle = it.start(
        "for n in range(60_000): print(n, 'x' * 300, flush=n % 100 == 0)\nprint('the end')",
        label="flood",
    )
    sizes = []
    while not handle.done():
        sizes += [sum(map(size, folder.iterdir())) for folder in journals(home)]
    assert max(sizes) < limit * 1.2
    recorder = Recorder()
    it.session.attach("flood", frontend=recorder)
    text = recorder.text
    assert text.startswith("0 x") and text.endswith("the end\n")
    assert "messages of this run were dropped: its journal was full" in text
    dropped = int(text.split(" messages of this run")[0].rsplit("[", 1)[1])
    kept = [record.number for record in recorder.records]
    assert kept == sorted(set(kept))
    assert len(kept) - 1 + dropped == kept[-1]


def test_a_slow_client_loses_nothing(
    path: Net, alone: Callable[..., Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mlinfra_sdk.providers.local.Config",
        partial(agent_module.Config, journal_limit=1 << 20),
    )
    it = alone(isolate=True)
    it.run("1")
    path.plan(lambda _: Plan(rate=4e6))
    path.cut()
    recorder = Recorder()
    it.run("for n in range(50_000): print(n, 'x' * 300)", recorder)
    assert recorder.text == "".join(f"{n} {'x' * 300}\n" for n in range(50_000))


# -- several clients -------------------------------------------------------------------------


def test_a_followed_run_is_taken_only_on_purpose(alone: Callable[..., Client]) -> None:
    first, second = alone(isolate=True, machine="shared"), alone(isolate=True, machine="shared")
    work, recorder = Work(3000, pause=0.1), Recorder()
    thread, found = in_background(lambda: first.run(work.code, recorder))
    until(lambda: len(recorder.records) > 5, "outputs")
    (info,) = second.session.runs()
    assert info.followed and info.status == "running"
    with pytest.raises(RequestError, match="another"):
        second.session.attach(info.run)
    watched = Recorder()
    watcher, _ = in_background(
        lambda: second.session.watch(info.run, watched.publish, until_end=True)
    )
    taken = Recorder()
    second.session.attach(info.run, frontend=taken, take=True)
    assert work.problems(taken.records) == []
    assert second.namespace["work_total"] == work.total
    ended(thread)
    (error,) = found
    assert isinstance(error, RunDetached) and "taken" in str(error)
    assert "work_total" not in first.namespace
    ended(watcher)
    assert work.problems(watched.records) == []
    assert first.run("2").value == 2
    assert second.run("work_total").value == work.total


def test_a_client_that_comes_back_learns_that_its_run_was_collected(
    path: Net, alone: Callable[..., Client]
) -> None:
    """A laptop that sleeps; meanwhile another one attaches."""
    sleeper, other = alone(isolate=True, machine="shared"), alone(isolate=True, machine="shared")
    work, recorder = Work(2000, pause=0.2), Recorder()
    thread, found = in_background(lambda: sleeper.run(work.code, recorder))
    until(lambda: len(recorder.records) > 5, "outputs")
    assert other.session.runs()
    other.session.machine.provider.direct = True
    path.down()
    until(lambda: "reconnecting" in recorder.phases, "the cut to be noticed")
    again = Recorder()
    other.session.attach(recorder.run, frontend=again)
    assert work.problems(again.records) == []
    path.up()
    ended(thread)
    (error,) = found
    assert isinstance(error, RunDetached)


def test_a_run_that_waits_is_cancelled(alone: Callable[..., Client]) -> None:
    it = alone()
    first = it.start(SLEEP, label="first")
    second = it.start("n = 2", label="second")
    third = it.start("n = 3", label="third", frontend=Recorder())
    until(lambda: first.info().status == "running", "the first to begin")
    assert [info.status for info in it.session.runs()] == ["running", "queued", "queued"]
    second.cancel()
    third.cancel()
    with pytest.raises(RunCancelled):
        it.session.attach("second")
    with pytest.raises(RunCancelled):
        third.result()
    first.cancel()
    with pytest.raises(KeyboardInterrupt):
        first.result()
    fourth = it.start("4", label="fourth")
    until(fourth.done, "its end")
    fourth.cancel()
    endless = it.start(SLEEP, label="endless")
    until(lambda: endless.info().status == "running", "it to begin")
    it.session.restart()
    assert it.session.runs() == []
    assert "n" not in it.namespace
    assert it.run("5").value == 5
    # While the machine lives: nothing is counted as its run for ever.
    runs = it.session.ledger.runs(it.session.machine.id)
    assert [run.status for run in runs] == [
        *("interrupted", "lost", "lost", "done", "lost", "done")
    ]
