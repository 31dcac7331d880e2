"""A big array there and back: `python -m benchmarks arrays`.

In one kernel, interleaved: ``%%remote``, ipyparallel's push and pull with one engine, and the
copy of the array into fresh memory (memcpy). Each transfer ends when one number of each page of
the array has been read on the other side. Each round has new content.

Some virtual machines get memory from their host when it is touched for the first time, at a tenth
of the usual speed: before anything is measured, memory is touched and freed, and the first round
is left out.
"""

from __future__ import annotations

import time

from benchmarks.harness import (
    LOAD,
    START_PEER,
    STOP_PEER,
    Figure,
    Kernel,
    Ran,
    kernel,
    median,
    say,
    stored_bytes,
)

GIB = 1 << 30
ROUNDS = 3
WARM_UP_GIB = 8

PREPARE = f"""\
import numpy as np
_warm = np.ones({WARM_UP_GIB} << 27)
del _warm
x = np.random.default_rng(1).random(1 << 27)
"""
CHANGE_ALL = "x += 0.1"
CHANGE_SOME = "x[:len(x) // 100] += 0.1"
COPY = "_copy = x.copy(); float(_copy[::512].sum())"
TOUCH = "touched = float(x[::512].sum())"
MAKE = "y = x + {}"
PUSH = f"""\
_view.push({{"x": x}}, block=True)
_view.execute({TOUCH!r}, block=True)
"""
PULL = """\
y = _view.pull("y", block=True)[0]
touched = float(y[::512].sum())
"""


def main() -> list[Figure]:
    """All figures of this module."""
    with kernel() as it:
        it.run(LOAD)
        it.run(START_PEER)
        it.run("%%px\nimport numpy as np")
        say("touching memory")
        it.run(PREPARE)
        figures = there_and_back(it)
        it.run(STOP_PEER)
        figures += again(it, "%%remote", "")
        figures += through_link(it)
    return figures


def there_and_back(it: Kernel) -> list[Figure]:
    """The array by value each way."""
    there: dict[str, list[float]] = {"ours": [], "push": [], "memcpy": []}
    back: dict[str, list[float]] = {"ours": [], "pull": [], "memcpy": []}
    for round_ in range(ROUNDS + 1):
        say(f"1 GiB there and back: round {round_}")
        it.run(CHANGE_ALL)
        ran = {
            ("there", "ours"): it.run(f"%%remote\n{TOUCH}"),
            ("there", "memcpy"): it.run(COPY),
            ("there", "push"): it.run(PUSH),
        }
        it.run("del _copy")
        it.run("%%remote\n" + MAKE.format(round_))
        ran["back", "ours"] = it.run("%remote pull y\ntouched = float(y[::512].sum())")
        it.run("del y")
        ran["back", "memcpy"] = it.run(COPY)
        it.run("del _copy")
        it.run("%%px\n" + MAKE.format(round_))
        ran["back", "pull"] = it.run(PULL)
        it.run("del y")
        it.run("%%px\ndel x, y")
        if round_:
            for (way, who), one in ran.items():
                (there if way == "there" else back)[who].append(one.seconds)
    return [_figure("there", there, "push"), _figure("back", back, "pull")]


def _figure(way: str, taken: dict[str, list[float]], peer: str) -> Figure:
    ours, other, copy = (median(taken[name]) for name in ("ours", peer, "memcpy"))
    return Figure(
        f"1 GiB of float64 {way}",
        ours,
        "s",
        {"memcpy": copy, f"ipyparallel {peer}": other},
        f"<= 1.2x memcpy, <= 0.5x {peer}",
        ours <= 1.2 * copy and ours <= 0.5 * other,
        f"median of {ROUNDS}; ours {', '.join(f'{t:.2f}' for t in taken['ours'])}; memcpy "
        + ", ".join(f"{t:.2f}" for t in taken["memcpy"]),
    )


def again(it: Kernel, magic: str, where: str) -> list[Figure]:
    """The array once more: unchanged, and with a hundredth of it changed."""
    code = f"{magic}\n{TOUCH}"
    it.run(code)
    say(f"the same array again {where}")
    unchanged = [_moved(it, code) for _ in range(ROUNDS)]
    some = []
    for _ in range(ROUNDS):
        it.run(CHANGE_SOME)
        some.append(_moved(it, code))
    seconds = median(ran.seconds for ran, _ in unchanged)
    payload = max(stored for _, stored in unchanged)
    share = 100 * max(stored for _, stored in some) / GIB
    return [
        Figure(
            f"the array again, unchanged{where}",
            seconds,
            "s",
            {},
            "<= 0.3 s, no payload",
            seconds <= 0.3 and not payload,
            f"{payload} bytes of payload, {max(map(_link_bytes, unchanged))} bytes on the link",
        ),
        Figure(
            f"the array again, 1 % changed{where}",
            median(ran.seconds for ran, _ in some),
            "s",
            {},
            "<= 2 % of the bytes",
            share <= 2,
            f"{share:.2f} % of the bytes stored anew, "
            f"{100 * max(map(_link_bytes, some)) / GIB:.2f} % on the link",
        ),
    ]


def _moved(it: Kernel, code: str) -> tuple[Ran, int]:
    """A cell, and how many bytes it added to the chunk stores."""
    before = stored_bytes(it.home)
    ran = it.run(code)
    return ran, stored_bytes(it.home) - before


def _link_bytes(moved: tuple[Ran, int]) -> int:
    card = moved[0].card
    return int(card["bytes_up"]) + int(card["bytes_down"])


def through_link(it: Kernel) -> list[Figure]:
    """A worker that shares nothing: everything goes through the link and a store of its own."""
    magic = "%%remote isolate=yes"
    it.run(f"{magic}\nimport numpy as np")
    there, back = [], []
    for round_ in range(ROUNDS):
        say(f"1 GiB through the link: round {round_ + 1}")
        it.run(CHANGE_ALL)
        there.append(it.run(f"{magic}\n{TOUCH}").seconds)
        it.run(f"{magic}\n{MAKE.format(100 + round_)}")
        back.append(it.run("%remote pull y\ntouched = float(y[::512].sum())").seconds)
        it.run("del y")
    note = "isolate=yes: hashed, stored, sent, stored; median of " + str(ROUNDS)
    figures = [
        Figure("1 GiB of float64 there, through the link", median(there), "s", note=note),
        Figure("1 GiB of float64 back, through the link", median(back), "s", note=note),
    ]
    time.sleep(1)
    return figures + again(it, magic, ", through the link")
