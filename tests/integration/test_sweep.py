"""What runs and should not is found and stopped; what is wanted, or another's, is left alone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from emulators.modal import Emulator

from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines import lifecycle
from mlinfra_sdk.machines.claim import claimed
from mlinfra_sdk.machines.lifecycle import LiveMachine
from mlinfra_sdk.machines.portal import portal
from mlinfra_sdk.machines.sweep import Sweep, sweep
from mlinfra_sdk.machines.sweeper import Sweeper
from mlinfra_sdk.providers.base import Handle, Offer
from mlinfra_sdk.providers.local import LocalProvider
from mlinfra_sdk.session import Session
from mlinfra_sdk.spec import Request

PAID = Request(on="local", price=3_600_000, env="none")  # 1000 micro-USD per second


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(Ledger.open()) as it:
        yield it
    portal().call(_stop_all())


async def _stop_all() -> None:
    provider = LocalProvider()
    for handle in await provider.list():
        await provider.stop(handle)


def machine(ledger: Ledger, name: str = "m", request: Request = PAID) -> LiveMachine:
    return portal().call(lifecycle.acquire(request, name, ledger))


def swept(ledger: Ledger, *, stop: bool = True, everywhere: bool = False) -> Sweep:
    return portal().call(sweep(ledger, stop=stop, everywhere=everywhere))


def running() -> set[str]:
    return {handle.key for handle in portal().call(LocalProvider().list())}


def test_what_is_wanted_is_left_alone_and_what_was_taken_for_ended_is_stopped(
    ledger: Ledger,
) -> None:
    wanted, forgotten = machine(ledger, "wanted"), machine(ledger, "forgotten")
    ledger.machine_stopped(forgotten.id, reason="the network was gone")
    before = ledger.cost(forgotten.id).total
    (found,) = swept(ledger, stop=False).findings
    assert (found.what, found.name, found.stopped) == ("forgotten", "forgotten", False)
    assert running() == {wanted.id, forgotten.id}
    (found,) = swept(ledger).findings
    assert found.stopped and "taken for ended (the network was gone)" in str(found)
    assert running() == {wanted.id}
    assert ledger.cost(forgotten.id).total > before, "the time that it ran on costs, too"
    assert swept(ledger).findings == []


def test_another_computers_machine_is_shown_and_stopped_only_on_demand(
    ledger: Ledger, tmp_path: Path
) -> None:
    theirs = machine(ledger)
    with contextlib.closing(Ledger.open(tmp_path / "other.sqlite")) as mine:
        (found,) = swept(mine).findings
        assert (found.what, found.stopped) == ("elsewhere", False)
        assert "another computer that uses this account" in str(found)
        assert running() == {theirs.id}
        (found,) = swept(mine, everywhere=True).findings
        assert found.stopped and running() == set()
        assert mine.machines() == []


def test_one_that_its_ledger_has_forgotten_is_put_on_record_and_stopped(ledger: Ledger) -> None:
    key = ledger.id + "0" * 22
    _launch(key)
    (found,) = swept(ledger).findings
    assert (found.what, found.stopped) == ("forgotten", True)
    (known,) = ledger.machines()
    assert (known.id, known.price.known) == (key, False)
    assert known.stopped_at is not None and running() == set()


def _launch(key: str) -> Handle:
    async def launch() -> Handle:
        (offer,) = await LocalProvider().offers(PAID)
        return await LocalProvider().launch(offer, PAID, key)

    return portal().call(launch())


def test_a_launch_whose_process_has_died_is_ended_but_not_one_that_goes_on(
    ledger: Ledger,
) -> None:
    begun = time.time() - 100
    key = ledger.intend_machine(name="m", provider="local", price=_offer().price, at=begun)
    never = ledger.intend_machine(name="never", provider="local", price=_offer().price, at=begun)
    _launch(key)

    async def while_it_is_launched() -> Sweep:
        async with claimed("m"), claimed("never"):
            return await sweep(ledger)

    assert portal().call(while_it_is_launched()).findings == []
    assert running() == {key}
    found = {it.key: it for it in swept(ledger).findings}
    assert found[key].what == "forgotten" and "whoever launched it has died" in str(found[key])
    assert found[never].what == "gone" and "it never started" in str(found[never])
    assert running() == set()
    assert 100_000 <= ledger.cost(key).total < 110_000
    assert ledger.cost(never).total == 0
    assert ledger.machines(active=True) == []


def _offer() -> Offer:
    return portal().call(LocalProvider().offers(PAID))[0]


@pytest.mark.parametrize("set_by", [0.0, -3600.0])
def test_what_is_gone_is_closed_with_the_time_at_which_it_ended(
    ledger: Ledger, set_by: float
) -> None:
    """Also if this computer's clock was set meanwhile: then its length is right."""
    begun = time.time()
    it = machine(ledger)
    launched = time.time()
    ledger.machine_started(it.id, handle=it.handle.to_json(), at=begun + set_by)
    (agent,) = (
        process
        for process in psutil.process_iter(["cmdline"])
        if it.handle.data["folder"] in (process.info["cmdline"] or [])
    )
    signalled = time.time()
    agent.send_signal(signal.SIGTERM)
    agent.wait()
    ended = time.time()
    time.sleep(1.2)
    (found,) = swept(ledger).findings
    assert (found.what, found.key) == ("gone", it.id)
    (known,) = ledger.machines()
    assert known.stopped_at is not None and known.started_at is not None
    length = known.stopped_at - known.started_at
    least = signalled - (launched if set_by else begun)  # its launch does not count then
    assert least - 0.1 <= length <= ended - begun + 0.1


def test_a_session_sweeps_when_it_starts_and_tells_with_a_later_run(
    modal_emulator: Emulator,
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MLINFRA_SWEEP")
    ours = Sweeper()
    monkeypatch.setattr("mlinfra_sdk.connection.sweeper", ours)
    request = Request(on="modal", env="none", sync=False, idle=300.0)
    lost = machine(ledger, "lost", request)
    ledger.machine_stopped(lost.id, reason="the network was gone")
    with Session(namespace={}, request=request) as session:
        session.run("x = 1")
        assert ours._process is not None and ours._process.wait(120) == 0
        (box,) = modal_emulator.boxes()
        assert session.machine is not None and box.tags == {"mlinfra": session.machine.id}
        session.run("x = 2")
        assert "lost on modal ran on although" in capsys.readouterr().err
        ours.start(ledger)
        assert ours._process is None, "that would be too early"
    assert modal_emulator.boxes() == []


def test_the_command_tells_what_it_has_done(ledger: Ledger) -> None:
    it = machine(ledger)
    ledger.machine_stopped(it.id, reason="the network was gone")

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mlinfra_sdk.cli", "sweep", *words],
            capture_output=True,
            text=True,
            env=os.environ,
        )

    shown = command("--dry-run")
    assert shown.returncode == 0 and f"{it.name} on local runs although" in shown.stdout
    assert "it is stopped" in command().stdout
    assert command().stdout == "Nothing runs that nobody wants.\n"
