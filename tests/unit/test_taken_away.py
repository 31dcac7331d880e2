"""Machines that somebody else ends: what their clouds tell, and what the watchdog makes of it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import anyio
import pytest
from emulators.metadata import metadata

from mlinfra_sdk.worker import preemption
from mlinfra_sdk.worker.watchdog import End, Limits, Watchdog, by_design

CLOUDS = {
    "AWS": preemption.aws_notice,
    "Google Cloud": preemption.google_notice,
    "Azure": preemption.azure_notice,
}


class Machine:
    """A watchdog, and the notices that it gave."""

    def __init__(self, folder: Path, *, busy: bool = True) -> None:
        self.busy = busy
        self.told: list[End] = []
        self.watchdog = Watchdog(Limits(), folder, busy=lambda: self.busy, connected=lambda: True)
        self.watchdog.when_ending(self.told.append)


@pytest.mark.parametrize("name", CLOUDS)
def test_a_cloud_gives_notice(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "_PAUSE", 0.05)
    machine = Machine(tmp_path)

    async def taken(address: str) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(preemption.ask, machine.watchdog, name, CLOUDS[name], address)
            while len(service.asked) < 6:  # it goes on to ask
                await anyio.sleep(0.01)
            assert not machine.told
            service.take_back(30)

    with metadata() as service:
        anyio.run(taken, service.address)
    (end,) = machine.told
    assert end.cause == "preemption" and end.reason == f"{name} takes back its spot machine"
    assert 20 < end.seconds < 29 and not by_design(end.reason)
    assert machine.watchdog.ends()[0].cause == "preemption"


@pytest.mark.parametrize("name", CLOUDS)
def test_a_machine_that_nobody_may_take_back_asks_once(name: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    with metadata(spot=False) as service:
        service.take_back(30)
        anyio.run(preemption.ask, machine.watchdog, name, CLOUDS[name], service.address)
        asked = len(service.asked)
    assert asked <= 2 and not machine.told


def test_where_nobody_answers_the_machine_stops_to_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "_PAUSE", 0.01)
    with metadata() as service:
        address = service.address
    machine = Machine(tmp_path)
    anyio.run(preemption.ask, machine.watchdog, "AWS", preemption.aws_notice, address)
    assert not machine.told


def test_a_cloud_is_known_by_its_variables_or_its_firmware(tmp_path: Path) -> None:
    vendor = tmp_path / "sys_vendor"
    assert preemption._cloud({}, vendor) is None
    said = {"Amazon EC2": "AWS", "Google": "Google Cloud", "Microsoft Corporation": "Azure"}
    for text, name in said.items():
        vendor.write_text(text + "\n")
        found = preemption._cloud({}, vendor)
        assert found is not None and found[::2] == (name, "http://169.254.169.254")
    vendor.write_text("Dell Inc.\n")
    assert preemption._cloud({}, vendor) is None
    found = preemption._cloud({"GCE_METADATA_HOST": "here:80"}, vendor)
    assert found is not None and found[::2] == ("Google Cloud", "http://here:80")


def test_a_busy_machine_goes_on_to_the_end_and_an_idle_one_ends(tmp_path: Path) -> None:
    async def lived(machine: Machine, *, work: float) -> float:
        began = time.monotonic()
        machine.watchdog.taken_away(3.0, "it is taken")
        async with anyio.create_task_group() as tasks:

            async def rest() -> None:
                await anyio.sleep(work)
                machine.busy = False

            tasks.start_soon(rest)
            assert await machine.watchdog.wait() == "it is taken"
            tasks.cancel_scope.cancel()
        return time.monotonic() - began

    busy, done, idle = Machine(tmp_path), Machine(tmp_path), Machine(tmp_path, busy=False)
    assert anyio.run(lambda: lived(busy, work=60)) >= 3.0
    assert [it.cause for it in busy.told] == ["preemption"]  # once
    assert 0.2 <= anyio.run(lambda: lived(done, work=0.2)) < 3.0
    assert anyio.run(lambda: lived(idle, work=60)) < 3.0
    assert not idle.told


def test_the_earliest_end_counts_and_no_extension_puts_it_off(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.watchdog.taken_away(100, "later")
    machine.watchdog.taken_away(50, "sooner")
    machine.watchdog.taken_away(80, "later, too")
    machine.watchdog.extend(3600)
    first = machine.watchdog.ends()[0]
    assert first.reason == "sooner" and 49 < first.seconds <= 50


@pytest.mark.parametrize(
    ("number", "grace", "environment", "reason"),
    [
        (signal.SIGTERM, 0.0, {}, "stopped"),
        (signal.SIGINT, 20.0, {}, "stopped"),
        (signal.SIGTERM, 20.0, {}, "its host ends it"),
        (signal.SIGTERM, 20.0, {"SLURM_JOB_ID": "7"}, "Slurm takes its node back"),
        (
            signal.SIGTERM,
            20.0,
            {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + 60)},
            "its time limit in Slurm was reached",
        ),
    ],
)
def test_signals(
    number: signal.Signals,
    grace: float,
    environment: dict[str, str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    machine = Machine(tmp_path)

    async def signalled() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(preemption.obey_signals, machine.watchdog, grace)
            await anyio.wait_all_tasks_blocked()
            os.kill(os.getpid(), number)
            while not (machine.told or machine.watchdog.reason):
                await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()

    anyio.run(signalled)
    told = [machine.watchdog.reason] if machine.watchdog.reason else [machine.told[0].reason]
    assert told == [reason]
