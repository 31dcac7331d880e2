"""How machines end: looked at without being kept, put off, announced, and kept by a GPU's work."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from clouds import A10G, GPUS
from live import end_of, until
from scripts import Place, place

from mlinfra_sdk.errors import MlinfraError
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines import ends
from mlinfra_sdk.session import Session


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A state directory for sessions of this process and for commands."""
    with place(tmp_path) as it:
        monkeypatch.setenv("MLINFRA_HOME", str(it.home))
        monkeypatch.chdir(tmp_path)
        yield it


def test_every_end_is_shown_and_can_be_put_off(here: Place) -> None:
    with Session(namespace={}, machine="one", idle="10m", time="20m") as session:
        with pytest.raises(MlinfraError, match="no machine that could be kept"):
            session.extend(60)
        session.run("1")
        (machine,) = json.loads(here.mlinfra("status", "--json").stdout)["machines"]
        assert [it["cause"] for it in machine["ends"]] == ["idle", "time", "lease"]
        assert 590 < machine["ends"][0]["seconds"] <= 600
        shown = here.mlinfra("status").stdout
        assert re.search(
            r"one stops in \d+m\S* without work \(idle\), or in \d+m\S* in any case \(time\)",
            " ".join(shown.split()),
        )
        # By whoever comes: no end but that for money is before that moment.
        assert here.mlinfra("extend", "1h").stdout == "one stops in 1h without work (idle).\n"
        # At the same second, either may be named first.
        assert {it.cause for it in session.extend(5400)[:2]} == {"idle", "time"}
        end = session.next_end()
        assert end is not None and 5390 < end.seconds <= 5400
        refused = here.mlinfra("extend", "one", "soon")
        assert refused.returncode == 2 and "no duration" in refused.stderr
        session.stop()


def test_whoever_only_looks_does_not_keep_a_machine(here: Place) -> None:
    session = Session(namespace={}, machine="seen", idle="2s")
    session.run("x = 1")
    ledger = Ledger.open()
    (known,) = ledger.machines(active=True)
    until(lambda: not ends.describe([known]), "its end")
    session.close()
    ledger.close()
    assert end_of("seen") == "idle for 2 s"


def test_kernels_and_clients_hear_of_the_end(
    here: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = []
    session = Session(namespace={}, machine="timed")
    session.run(
        f"""
        import os, threading
        from mlinfra_sdk.worker.ending import when_ending

        def save(end):
            with open({str(here.folder / "saved")!r}, "a") as file:
                print(end.cause, end.seconds > 0, end.reason, file=file, flush=True)

        def fail(end):
            raise ValueError("not now")

        when_ending(fail)
        when_ending(save)
        """.replace("\n        ", "\n")
    )
    session.noticed = heard.append
    session.configure(msgspec.structs.replace(session.request, time=5.0))
    until(lambda: not here.agents(), "its end")
    session.close()
    assert (here.folder / "saved").read_text() == "time True its time of 5 s was over\n"
    assert end_of("timed") == "its time of 5 s was over"
    assert [end.cause for end in heard] == ["time"]
    assert "stops in 1s: its time= is over then" in ends.notice(heard[0])
    assert "ValueError: not now" in capsys.readouterr().err


def test_a_busy_gpu_is_work(here: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Path(__file__).parent / "nvml.c"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", here.folder / "libnvidia-ml.so.1", library], check=True
    )
    load = here.folder / "load"
    monkeypatch.setenv("LD_LIBRARY_PATH", str(here.folder))
    monkeypatch.setenv(GPUS, f"{A10G};{A10G}")
    monkeypatch.setenv("RECORDED_LOAD", str(load))
    load.write_text("0 0;37 0")  # percent and process of each device; in a container none is told
    session = Session(namespace={}, machine="busy", idle="3s")
    session.run("x = 1")
    ledger = Ledger.open()
    (known,) = ledger.machines(active=True)
    ledger.close()
    began = time.monotonic()

    def still() -> float:
        return ends.describe([known])[known.id].idle_seconds

    until(lambda: still() > 0.3, "the cell's end")
    until(lambda: still() < 0.2, "the GPU's work to be seen")
    until(lambda: time.monotonic() - began > 5, "longer than idle=")
    assert still() < 3
    load.write_text("1 0;0 0")  # below the threshold
    session.close()
    assert end_of("busy") == "idle for 3 s"
