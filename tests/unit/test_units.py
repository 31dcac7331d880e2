"""Durations, sizes and money as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlinfra_sdk import units


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("15m", 900),
        ("2h", 7200),
        ("1h30m", 5400),
        ("90s", 90),
        ("1.5h", 5400),
        ("1d2h", 93600),
        ("5M", 300),
    ],
)
def test_parse_duration(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", " ", "15", "m", "15 m", "30m1h", "-5m", "1h30", "five minutes"]
)
def test_malformed_duration(text: str) -> None:
    with pytest.raises(ValueError):
        units.parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0042, "4ms"),
        (0.9999, "1s"),
        (3.44, "3.4s"),
        (59.97, "1m"),
        (65, "1m05s"),
        (3600, "1h"),
        (5400, "1h30m"),
        (-1, "0ms"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert units.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MB", 64_000_000),
        ("2GiB", 2 << 30),
        ("1.5kB", 1500),
        ("0B", 0),
        ("10 mb", 10_000_000),
        ("1TiB", 1 << 40),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "64", "MB", "64 megabytes", "-1MB", "1XB", "1BB"])
def test_malformed_size(text: str) -> None:
    with pytest.raises(ValueError):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_234_567, "1.23 MB"),
        (45_678_901, "45.7 MB"),
        (100_000_000, "100 MB"),
        (999_600, "1 MB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_format_size(size: int, text: str) -> None:
    assert units.format_size(size) == text


@given(st.integers(0, 10**16))
def test_a_formatted_size_is_within_a_percent(size: int) -> None:
    assert units.parse_size(units.format_size(size)) == pytest.approx(size, rel=0.01)


@given(st.floats(0.001, 10**7))
def test_a_formatted_duration_is_close(seconds: float) -> None:
    text = units.format_duration(seconds)
    value = float(text[:-2]) / 1000 if text.endswith("ms") else units.parse_duration(text)
    assert value == pytest.approx(seconds, rel=0.5 if seconds < 0.01 else 0.02)


def test_money() -> None:
    assert units.parse_usd("0.35") == units.parse_usd("$0.35") == 350_000
    assert units.format_usd(0) == "$0.00"
    assert units.format_usd(1_250_000) == "$1.25"
    assert units.format_usd(4_200) == "$0.0042"
    assert units.format_usd(3) == "<$0.0001"
    assert units.cost(3_600_000, 10) == 10_000
    assert units.cost(3_600_000, -10) == 0


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "1e", "free", "0,35"])
def test_malformed_money(text: str) -> None:
    with pytest.raises(ValueError):
        units.parse_usd(text)
