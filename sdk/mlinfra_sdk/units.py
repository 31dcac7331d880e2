"""Values with units as users write and read them: durations, sizes, money.

Inside the program a duration is seconds (float), a size is bytes (int) and money is micro-USD
(int, so that sums are exact).
"""

from __future__ import annotations

import math
import re

MICRO = 1_000_000

_DURATION = re.compile(
    r"(?:(?P<d>\d+(?:\.\d+)?)d)?(?:(?P<h>\d+(?:\.\d+)?)h)?"
    r"(?:(?P<m>\d+(?:\.\d+)?)m)?(?:(?P<s>\d+(?:\.\d+)?)s)?",
    re.IGNORECASE,
)
_DURATION_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?) ?(?P<unit>[KMGT]i?B|B)", re.IGNORECASE)
_SIZE_BYTES: dict[str, int] = {"b": 1} | {
    f"{letter}{suffix}": base**power
    for suffix, base in (("b", 1000), ("ib", 1024))
    for power, letter in enumerate("kmgt", start=1)
}


def parse_duration(text: str) -> float:
    """Seconds of a duration such as ``15m``, ``1h30m`` or ``90s``; ValueError if malformed."""
    match = _DURATION.fullmatch(text.strip())
    if not text.strip() or match is None:
        raise ValueError(f"not a duration: {text!r}")
    return sum(
        float(number) * _DURATION_SECONDS[unit]
        for unit, number in match.groupdict().items()
        if number is not None
    )


def format_duration(seconds: float) -> str:
    """A duration in the words of :func:`parse_duration`, rounded to what matters."""
    seconds = max(seconds, 0.0)
    if seconds < 0.9995:
        return f"{round(seconds * 1000)}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}".removesuffix(".0") + "s"
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours}h{minutes:02d}m" if minutes else f"{hours}h"
    return f"{minutes}m{secs:02d}s" if secs else f"{minutes}m"


def parse_size(text: str) -> int:
    """Bytes of a size such as ``64MB`` (10^6) or ``2GiB`` (2^30); ValueError if malformed."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a size: {text!r}")
    factor: int = _SIZE_BYTES[match["unit"].lower()]
    return round(float(match["number"]) * factor)


def format_size(size: int) -> str:
    """A size with a decimal unit and about three digits: ``64 MB``, ``1.25 GB``."""
    if size < 1000:
        return f"{size} B"
    value = float(size)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            break
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    text = f"{value:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if digits else text} {unit}"


def parse_usd(text: str) -> int:
    """Micro-USD of an amount such as ``0.35``; ValueError if malformed or negative."""
    amount = float(text.strip().removeprefix("$"))
    if not math.isfinite(amount) or amount < 0:
        raise ValueError(f"not an amount: {text!r}")
    return round(amount * MICRO)


def format_usd(micro: int) -> str:
    """Money with cents, and with more digits where cents would hide it: ``$1.25``, ``$0.0042``."""
    if micro == 0 or micro >= MICRO // 10:
        return f"${micro / MICRO:.2f}"
    return f"${micro / MICRO:.4f}" if micro >= 50 else "<$0.0001"


def cost(micro_per_hour: int, seconds: float) -> int:
    """Micro-USD that ``seconds`` at a rate of ``micro_per_hour`` cost, rounded down."""
    return int(micro_per_hour * max(seconds, 0.0) / 3600)
