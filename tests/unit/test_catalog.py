"""Names of accelerators, what ``gpu=`` means, and prices with their source and date."""

from __future__ import annotations

import datetime
import os
import re
import stat
from collections import Counter
from pathlib import Path

import pytest

from jupyter_mlinfra.magics import grammar, status
from mlinfra_sdk import spec
from mlinfra_sdk.catalog import (
    Device,
    Gpu,
    Gpus,
    Rate,
    catalog,
    current_rates,
    describe_devices,
    is_stale,
    parse_gpus,
    rates_for,
)
from mlinfra_sdk.catalog.prices import bundled_rates, store_live
from mlinfra_sdk.errors import RequestError
from mlinfra_sdk.spec import CELL

MIB = 1 << 20
A10G = Device("NVIDIA A10G", 23028 * MIB)
A10 = Device("NVIDIA A10", 23028 * MIB)
T4 = Device("Tesla T4", 15360 * MIB)
H100 = Device("NVIDIA H100 80GB HBM3", 81559 * MIB)
A100_40 = Device("NVIDIA A100-SXM4-40GB", 40960 * MIB)
A100_80 = Device("NVIDIA A100 80GB PCIe", 81920 * MIB)
UNKNOWN = Device("NVIDIA GeForce RTX 4080", 16376 * MIB)


def wanted(text: str) -> Gpus:
    gpus = parse_gpus(text)
    assert gpus is not None
    return gpus


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("mlinfra_sdk.paths.config_file", lambda: tmp_path / "config.toml")
    monkeypatch.setenv("MLINFRA_HOME", str(tmp_path / "home"))
    return tmp_path


# -- the data ------------------------------------------------------------------------------


def test_every_spelling_means_one_accelerator() -> None:
    known = catalog()
    plain = [re.sub("[^a-z0-9]", "", alias.lower()) for _, alias in known.spellings()]
    assert [name for name, n in Counter(plain).items() if n > 1] == []
    devices = [device for part in known.parts.values() for device in part.devices]
    assert len(set(devices)) == len(devices)
    for name, alias in known.spellings():
        assert known.canonical(alias) == name
        assert known.canonical(alias.lower().replace("-", " ")) == name
        assert str(wanted(alias)) == name


def test_every_figure_has_a_source_and_a_day() -> None:
    for part in catalog().parts.values():
        assert part.source.startswith("https://"), part
        datetime.date.fromisoformat(part.seen)
        assert part.memory_gb > 0 and part.bandwidth_gb_s > 0 and part.devices
        tflops = part.tflops
        if tflops.tf32 and tflops.bf16:  # twice as many operations of half the width
            assert 1.9 < tflops.bf16 / tflops.tf32 < 2.1, part
        assert not part.counts_as or part.counts_as in catalog().parts
    for group in catalog().groups.values():
        assert set(group.parts) <= set(catalog().parts) and len(group.parts) > 1


def test_every_price_has_a_source_and_a_day_in_the_past() -> None:
    rates = bundled_rates()
    assert len(rates) > 40
    for rate in rates:
        assert rate.usd_per_hour > 0, rate
        assert rate.source.startswith("https://"), rate
        assert datetime.date.fromisoformat(rate.date) <= datetime.date.today()
        assert catalog().canonical(rate.gpu) == rate.gpu, rate
    keys = Counter((*rate.key, rate.sku, rate.region) for rate in rates)
    assert [key for key, n in keys.items() if n > 1] == []


# -- gpu= ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a10", "A10"),
        ("A10:2", "A10:2"),
        ("a100 80gb", "A100-80GB"),
        ("A100-80", "A100-80GB"),
        ("nvidia h100", "H100"),
        ("rtx 4090", "RTX-4090"),
        ("Tesla T4", "T4"),
        ("A10|L4|T4", "A10|L4|T4"),
        ("A10:2 | 24GB | any", "A10:2|24GB|any"),
        ("24gb:4", "24GB:4"),
        ("ANY", "any"),
    ],
)
def test_what_can_be_asked_for(text: str, shown: str) -> None:
    assert str(wanted(text)) == shown
    assert wanted(shown) == wanted(text)


def test_none_is_no_gpu() -> None:
    assert parse_gpus("none") is None


@pytest.mark.parametrize(
    ("text", "proposal"),
    [("A1O", "A10"), ("H1000", "H100"), ("L4OS", "L40S"), ("RTX-5090", "RTX-4090"), ("xyz", "")],
)
def test_an_unknown_name_gets_the_nearest(text: str, proposal: str) -> None:
    with pytest.raises(RequestError) as caught:
        spec.parse({"gpu": text}, place=CELL, origin="the cell")
    assert f"gpu={text} in the cell" in str(caught.value)
    assert ("Did you mean" in str(caught.value)) == bool(proposal)
    assert not proposal or f"Did you mean '{proposal}'" in str(caught.value)


def test_an_alternative_must_not_come_twice() -> None:
    with pytest.raises(RequestError, match="given twice"):
        spec.parse({"gpu": "A10|a10"}, place=CELL, origin="the cell")


@pytest.mark.parametrize(
    ("text", "devices", "found"),
    [
        ("A10", [A10], "A10"),
        ("A10", [A10G], "A10G"),  # a stand-in is named as what it is
        ("A10G", [A10], None),
        ("A10:2", [A10], None),
        ("A10:2", [A10G, T4, A10], "A10G:2"),
        ("A100", [A100_40], "A100-SXM-40GB"),
        ("A100-80GB", [A100_40], None),
        ("A100-80GB", [A100_40, A100_80], "A100-PCIE-80GB"),
        ("H100-NVL", [H100], None),
        ("T4", [], None),
        ("H100|A10|T4", [T4, A10], "A10"),
        ("any", [UNKNOWN], UNKNOWN.name),
        ("any:2", [T4], None),
    ],
)
def test_what_a_machine_has_of_it(text: str, devices: list[Device], found: str | None) -> None:
    given = wanted(text).found_in(devices)
    assert (given and str(Gpu(given.name, given.count))) == found


@pytest.mark.parametrize(
    ("text", "device", "fits"),
    [("24GB", A10G, True), ("16GB", T4, True), ("24GB", T4, False), ("80GB", H100, True)],
)
def test_memory_is_that_of_one_device(text: str, device: Device, fits: bool) -> None:
    assert bool(wanted(text).found_in([device, device])) == fits


def test_what_a_machine_has_in_words() -> None:
    assert describe_devices([T4, A10G, T4, UNKNOWN]) == f"T4:2, A10G, {UNKNOWN.name}"
    assert describe_devices([]) == ""


@pytest.mark.parametrize(
    ("wish", "offered", "met"),
    [
        ("A100", Gpu("A100-80GB"), True),
        ("A100-80GB", Gpu("A100"), False),  # it might be the smaller one
        ("A100-80GB", Gpu("A100-80GB", 8), False),
        ("24GB", Gpu("L4"), True),
        ("48GB", Gpu("A100"), False),
        ("40GB", Gpu("A100"), True),
        ("any", Gpu("MI300X"), True),
        ("A10", Gpu("A10G"), True),
        ("A10", Gpu("something new"), False),
    ],
)
def test_an_offer_must_meet_a_wish_for_sure(wish: str, offered: Gpu, met: bool) -> None:
    assert (wanted(wish).rank(offered) == 0) == met


# -- prices --------------------------------------------------------------------------------


def test_rates_come_in_the_order_of_the_alternatives_then_by_price(home: Path) -> None:
    fits = rates_for(wanted("A10|L40S"))
    names = [fit.gpu.name for fit in fits]
    first = names.index("L40S")
    assert first > 0 and "L40S" not in names[:first] and set(names[first:]) == {"L40S"}
    prices = [fit.micro_per_hour for fit in fits[first:]]
    assert prices == sorted(prices)


def test_a_price_for_several_is_that_of_all_of_them(home: Path) -> None:
    (one,) = rates_for(wanted("A10"), "modal")
    (two,) = rates_for(wanted("A10:2"), "modal")
    assert one.micro_per_hour == 1_101_600
    assert two.micro_per_hour == 2 * one.micro_per_hour
    assert rates_for(wanted("A10:8"), "modal") == []  # there are at most four
    assert [fit.micro_per_hour for fit in rates_for(wanted("H100:8"), "aws")] == [55_040_000]
    assert rates_for(wanted("H100"), "aws") == []  # they come in eights


def test_live_is_trusted_more_than_the_users_own_and_that_more_than_the_file(home: Path) -> None:
    def price() -> tuple[int, str]:
        (fit,) = rates_for(wanted("A10"), "modal")
        return fit.micro_per_hour, fit.rate.trust

    assert price() == (1_101_600, "bundled")
    (home / "config.toml").write_text('idle = "5m"\n[prices]\nmodal.a10 = 1.05\n')
    os.utime(home / "config.toml", (1.7e9, 1.7e9))
    assert price() == (1_050_000, "yours")
    (fit,) = rates_for(wanted("A10:4"), "modal")  # all else is as the file says
    assert fit.micro_per_hour == 4_200_000
    assert (fit.rate.sku, fit.rate.granularity_s, fit.rate.date) == ("A10", 1, "2023-11-14")
    assert fit.rate.source == str(home / "config.toml")
    assert spec.resolve(spec.configured(home)).request.idle == 300

    live = Rate(vendor="modal", gpu="A10", usd_per_hour=0.99, source="modal", date="2026-11-25")
    store_live("modal", [live])
    assert price() == (990_000, "live")
    assert stat.S_IMODE((home / "home" / "rates.json").stat().st_mode) == 0o600
    store_live("modal", [])  # it does not give them any more
    assert price() == (1_050_000, "yours")
    assert len(current_rates()) == len(bundled_rates())


def test_a_damaged_file_of_live_rates_is_no_obstacle(home: Path) -> None:
    store_live("modal", [])
    (home / "home" / "rates.json").write_text('{"rates": 3')
    assert len(current_rates()) == len(bundled_rates())
    live = Rate(vendor="new", gpu="T4", usd_per_hour=0.5, source="new", date="2026-11-25")
    store_live("new", [live])
    assert [fit.micro_per_hour for fit in rates_for(wanted("T4"), "new")] == [500_000]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prices = 3", "prices = 3 under"),
        ("[prices]\nmodal = 1.0", "modal = 1.0 under"),
        ("[prices]\nmodal.A10 = '1'", "modal.A10 = '1' under"),
        ("[prices]\nmodal.A10 = -1", "modal.A10 = -1 under"),
        ("[prices]\nmodal.A11 = 1", "unknown GPU 'A11'.*Did you mean 'A10'"),
    ],
)
def test_a_malformed_price_is_one_error_with_its_place(home: Path, text: str, message: str) -> None:
    (home / "config.toml").write_text(text)
    with pytest.raises(RequestError, match=message) as caught:
        current_rates()
    assert "config.toml" in str(caught.value)


def test_prices_grow_old() -> None:
    day = datetime.date(2026, 11, 25)
    assert not is_stale("2026-08-27", day)
    assert is_stale("2026-08-26", day)
    assert is_stale("", day)


def test_the_magic_shows_the_same_tables(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status.show_catalog(("24GB",))
    shown = capsys.readouterr().out
    assert "RTX-4090" in shown and "A10G" in shown and "T4" not in shown
    assert "lambda" in shown and "TFLOPS without sparsity" in shown
    status.show_catalog(("P100",))
    assert "price unknown" in capsys.readouterr().out
    assert grammar.parse_command("catalog A10|L4 --refresh").arguments == ("A10|L4", "--refresh")
