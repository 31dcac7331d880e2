"""Which machine a request gets: offers of all providers, and whether it is what was asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
from clouds import A10G, GPUS, H100, T4, clouds
from live import opened
from scripts import Place, place

from mlinfra_sdk import spec
from mlinfra_sdk.catalog import Gpu, Gpus, rates_for
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.ledger import Ledger
from mlinfra_sdk.machines import market
from mlinfra_sdk.spec import CELL, Request


def request(**values: object) -> Request:
    return spec.resolve([spec.parse(values, place=CELL, origin="the test")]).request


def ask(**values: object) -> market.Market:
    return anyio.run(market.offers, request(**values))


def taken(found: market.Market) -> list[str]:
    return [f"{quote.offer.gpu} {quote.target}" for quote in found.quotes]


def test_the_cheapest_is_first_and_an_unknown_price_last(tmp_path: Path) -> None:
    prices = {"cheap": 1, "dear": 2, "odd": None}
    with clouds(tmp_path, **{name: {"gpus": {"A10": usd}} for name, usd in prices.items()}):
        found = ask(gpu="A10")
        assert taken(found) == ["A10 cheap", "A10 dear", "A10 odd"]
        assert found.notes == ["local has none."]
        assert market.announcement(found, request(gpu="A10")) == (
            "A10 on cheap at $1.00/h (cheap.example, 2026-11-25): $0.17 in 10 minutes; "
            "it starts in about 30s. local has none."
        )
        assert str(found.quotes[-1]) == "A10 on odd at price unknown"
        assert taken(ask(gpu="A10", on="dear")) == ["A10 dear"]


def test_alternatives_come_in_their_order_whatever_they_cost(tmp_path: Path) -> None:
    with clouds(tmp_path, cheap={"gpus": {"T4": 0.1, "A10G": 3}}, dear={"gpus": {"A10": 2}}):
        assert taken(ask(gpu="A10|T4")) == ["A10 dear", "A10G cheap", "T4 cheap"]
        assert taken(ask(gpu="24GB")) == ["A10 dear", "A10G cheap"]
        assert taken(ask(gpu="any")) == ["T4 cheap", "A10 dear", "A10G cheap"]


def test_providers_that_fail_or_hang_are_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(market, "PATIENCE", 6)
    with clouds(tmp_path, cheap={"error": "down"}, dear={"gpus": {"A10": 2}}, odd={"hangs": True}):
        found = ask(gpu="A10")
    assert taken(found) == ["A10 dear"]
    assert found.notes == ["cheap: down", "local has none.", "odd did not answer within 6 s."]


def test_nothing_to_be_had_says_what_each_lacks(tmp_path: Path) -> None:
    plans = {"cheap": {"gpus": {"A10": 1}}, "odd": {"error": "down"}}
    with clouds(tmp_path, **plans), pytest.raises(RequestError) as caught:
        ask(gpu="B200")
    assert caught.value.message == "gpu=B200 is not to be had."
    for part in (
        "cheap has none.",
        "odd: down",
        "local has none.",
        "dear: There is no token.",
        "doctor",
    ):
        assert part in caught.value.hint


def test_without_a_gpu_nobody_is_asked(tmp_path: Path) -> None:
    with clouds(tmp_path, cheap={"hangs": True}):
        found = ask()
        assert taken(found) == ["None local"]
        assert market.announcement(found, request()) == ""
    assert request().place == request(on="local").place


def test_live_rates_are_asked_of_those_who_tell_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLINFRA_ENV", "none")
    with clouds(tmp_path, cheap={"gpus": {"A10": 1, "T4": 0.2}}, odd={"error": "down"}):
        assert anyio.run(market.refresh_rates) == ({"cheap": 2}, ["odd: down"])
        counts, notes = anyio.run(market.refresh_rates, ["cheap", "dear", "local"])
        assert counts == {"cheap": 2}
        assert notes == ["dear: There is no token.", "local does not tell its rates."]
    assert [fit.micro_per_hour for fit in rates_for(Gpus((Gpu("A10"),)), "cheap")] == [1_000_000]


# -- what the machine really has -----------------------------------------------------------


def seen(library: Path, gpus: str, visible: str | None) -> list[list[object]]:
    env = {**os.environ, "LD_LIBRARY_PATH": str(library), GPUS: gpus}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        env["CUDA_VISIBLE_DEVICES"] = visible
    code = (
        "import msgspec; from mlinfra_sdk.worker import gpus;"
        "print(msgspec.json.encode([[it.name, it.memory] for it in gpus.present()]).decode())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: list[list[object]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, [0, 1, 2]),
        ("2,0", [2, 0]),
        ("", []),
        ("-1", []),
        ("1,7,0", [1]),
        ("GPU-0001-recorded,2", [1, 2]),
        ("GPU-0002", [2]),
        ("GPU-", []),
        ("1,1", [1]),
    ],
)
def test_the_driver_is_asked_for_what_kernels_may_use(
    tmp_path: Path, visible: str | None, indices: list[int]
) -> None:
    every = [
        ["NVIDIA A10G", 23028 << 20],
        ["Tesla T4", 15360 << 20],
        ["NVIDIA H100 80GB HBM3", 81559 << 20],
    ]
    with clouds(tmp_path):
        assert seen(tmp_path, f"{A10G};{T4};{H100}", visible) == [every[i] for i in indices]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Place]:
    folder = tmp_path / "place"
    folder.mkdir()
    with place(folder) as it:
        yield it


SCRIPT = """
import mlinfra_sdk, sys
session = mlinfra_sdk.Session(gpu=sys.argv[1])
session.run("x = 6 * 7")
machine = session.machine
print(session.namespace["x"], machine.offer.gpu, machine.target)
"""


def run(here: Place, gpu: str) -> subprocess.CompletedProcess[str]:
    names = ("PYTHONPATH", "LD_LIBRARY_PATH", "CLOUDS")
    here.env.update({name: os.environ[name] for name in names})
    return here.run(str(here.write("script.py", SCRIPT)), gpu)


def test_the_next_offer_is_taken_when_one_has_no_capacity(here: Place, tmp_path: Path) -> None:
    plans = {
        "cheap": {"gpus": {"A10": 1}, "full": True},
        "dear": {"gpus": {"A10": 2}, "has": A10G},
    }
    with clouds(tmp_path / "clouds", **plans):
        done = run(here, "A10")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "42 A10G dear\n"  # what it really is
    first, second = done.stderr.splitlines()
    assert first == (
        "A10 on cheap at $1.00/h (cheap.example, 2026-11-25): $0.17 in 10 minutes; "
        "it starts in about 30s. local has none."
    )
    assert second == (
        f"{first} cheap has no capacity: No A10 is free. "
        "Now A10 on dear at $2.00/h (dear.example, 2026-11-25)."
    )


def test_a_machine_with_another_gpu_is_stopped(here: Place, tmp_path: Path) -> None:
    with clouds(tmp_path / "clouds", cheap={"gpus": {"A10": 1}, "has": T4}):
        done = run(here, "A10")
    assert done.returncode == 1
    assert "WrongGpu: gpu=A10 was asked for, but the machine auto-" in done.stderr
    assert "has T4." in done.stderr
    here.wait_until_no_agent()
    ledger = Ledger.open(here.home / "ledger.sqlite")
    (machine,) = ledger.machines()
    ledger.close()
    assert machine.stopped_at is not None and "has T4" in machine.stop_reason


def test_too_few_gpus_are_another_machine_too(here: Place, tmp_path: Path) -> None:
    with clouds(tmp_path / "clouds", cheap={"gpus": {"A10": 1}, "has": ""}):
        done = run(here, "A10")
    assert "has no NVIDIA GPU that its driver knows of" in done.stderr


def test_another_of_the_alternatives_is_said(here: Place, tmp_path: Path) -> None:
    with clouds(tmp_path / "clouds", cheap={"gpus": {"A10": 1}, "has": T4}):
        done = run(here, "A10|T4")
    assert done.stdout == "42 T4 cheap\n"
    assert "The machine has T4 instead of A10, which gpu=A10|T4 allows." in done.stderr


def test_the_card_shows_what_was_given(tmp_path: Path) -> None:
    plan = {"gpus": {"A10": 1}, "has": A10G}
    with clouds(tmp_path / "clouds", cheap=plan), opened(tmp_path / "notebook") as notebook:
        for number in (1, 2):  # with a new machine, and on it again
            cell = notebook.run(f"%%remote gpu=A10\n{number}")
            assert cell.reply["status"] == "ok", cell.error
            card = cell.cards[-1]["content"]["data"]["text/plain"]
            assert "cheap A10G" in card and "($1.00/h)" in card
            assert ("A10 on cheap at $1.00/h" in card) == (number == 1)
