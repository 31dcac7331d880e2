"""A big array there and back: `python -m benchmarks arrays`.

In one kernel, interleaved: ``%%remote``, ipyparallel's push and pull with one engine, and the
copy of the array into fresh memory (memcpy). Each transfer ends when one number of each page of
the array has been read on the other side. Each round has new content.

Each transfer takes a gigabyte of new memory (memcpy for the copy, ``%%remote`` for chunks in the
page cache). Some virtual machines give free memory back to their host within seconds, and then it
costs ten times as much to touch it again: so right before each transfer some memory is touched and
freed, and their order is random.
"""

from __future__ import annotations

import random
import time

import numpy

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
WARM_GIB = 2

PREPARE = "import numpy as np; x = np.random.default_rng(1).random(1 << 27)"
CHANGE_ALL = "x += 0.1"
CHANGE_SOME = "x[:len(x) // 100] += 0.1"
COPY = "_copy = x.copy(); float(_copy[::512].sum())"
TOUCH = "touched = float(x[::512].sum())"
MAKE = "y = x + {}"
PUSH = f"""\
_view.push({{"x": x}}, block=True)
_view.execute({TOUCH!r}, block=True)
"""
GET = "%remote pull y\ntouched = float(y[::512].sum())"
PULL = """\
_copy = _view.pull("y", block=True)[0]
touched = float(_copy[::512].sum())
"""


def main() -> list[Figure]:
    """All figures of this module."""
    with kernel() as it:
        it.run(LOAD)
        it.run(START_PEER)
        it.run("%%px\nimport numpy as np")
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
    shuffle = random.Random(1)
    for round_ in range(ROUNDS):
        say(f"1 GiB there and back: round {round_ + 1}")
        it.run(CHANGE_ALL)
        _round(it, shuffle, there, {"ours": f"%%remote\n{TOUCH}", "push": PUSH, "memcpy": COPY})
        for magic in ("%%remote", "%%px"):
            it.run(f"{magic}\n{MAKE.format(round_)}")
        _round(it, shuffle, back, {"ours": GET, "pull": PULL, "memcpy": COPY})
        it.run("%%px\ndel x, y")
        it.run("del y")
    return [_figure("there", there, "push"), _figure("back", back, "pull")]


def _round(
    it: Kernel, shuffle: random.Random, taken: dict[str, list[float]], codes: dict[str, str]
) -> None:
    names = list(codes)
    shuffle.shuffle(names)
    for name in names:
        warm_memory()
        taken[name].append(it.run(codes[name]).seconds)
        it.run("_copy = None")


def warm_memory() -> None:
    """Have free memory at hand that this machine really has."""
    numpy.ones(WARM_GIB << 27)


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
    stored = 100 * max(stored for _, stored in some) / GIB
    sent = 100 * max(map(_link_bytes, some)) / GIB
    share = sent if where else stored
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
            f"{stored:.2f} % of the bytes stored anew, {sent:.2f} % on the link",
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
    magic = "%%remote isolate=yes env=none"
    it.run(f"{magic}\nimport numpy as np")
    there, back = [], []
    for round_ in range(ROUNDS):
        say(f"1 GiB through the link: round {round_ + 1}")
        it.run(CHANGE_ALL)
        there.append(it.run(f"{magic}\n{TOUCH}").seconds)
        it.run(f"{magic}\n{MAKE.format(100 + round_)}")
        back.append(it.run(GET).seconds)
        it.run("del y")
    note = "isolate=yes: hashed, stored, sent, stored; median of " + str(ROUNDS)
    figures = [
        Figure("1 GiB of float64 there, through the link", median(there), "s", note=note),
        Figure("1 GiB of float64 back, through the link", median(back), "s", note=note),
    ]
    time.sleep(1)
    return figures + again(it, magic, ", through the link")
