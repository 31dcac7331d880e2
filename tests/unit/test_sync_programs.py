"""Random programs whose cells alternate between the sides give what an all-local run gives."""

from __future__ import annotations

import collections
import functools
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sides import HIDDEN, ProcessWorker, Sides, run_cell, worker_process

SETUP = """
import collections, functools
import numpy as np
class Box:
    count = 0
    def __init__(self, value):
        self.value = value
        Box.count += 1
    def bump(self):
        self.bumps = getattr(self, "bumps", 0) + 1
        return self
class Slotted:
    __slots__ = ("value", "other")
    def __init__(self, value):
        self.value = value
class Sub(Box):
    def bump(self):
        super().bump()
        return [self]
def counter():
    n = 0
    def up():
        nonlocal n
        n += 1
        return n
    def get():
        return n
    return up, get
def put(box, item):
    global total
    total += 1
    box.append(item)
    return box
total = 0
a = [1]
b = [a, {"k": a}]
c = Box(a)
d = np.arange(6)
e, f = counter()
"""

names = st.sampled_from("abcdefg")

STATEMENTS = [
    "{x} = []",
    "{x} = {y}",
    "{x} = [{y}, {z}]",
    "{x} = ({y}, [{z}])",
    "{x} = {{'k': {y}, 'l': {z}}}",
    "{x} = Box({y})",
    "{x} = Slotted({y})",
    "{x}.value = {y}",
    "{x}.other = [{y}]",
    "{x}.append({y})",
    "put({x}, {y})",
    "{x}.extend([{y}, 3])",
    "{x}[0] = {y}",
    "{x}[0] += 1",
    "{x}['k'] = {y}",
    "{x}.pop()",
    "{x}.clear()",
    "{x} = {y}[0]",
    "{x} = {y}.value",
    "{x} = {y}['k']",
    "del {x}",
    "del {x}[0]",
    "{x} = np.arange(5.0)",
    "{x} = {y}[1:]",
    "{x}[:2] = 7",
    "{x} += {y}",
    "{x} = {{1, 2}}",
    "{x}.add(5)",
    "{x} = counter()",
    "{x}, {y} = counter()",
    "{x}[0]()",
    "{x}()",
    "{x} = lambda: {y}",
    "{x} = {y}()",
    "{x} = {y}.bump()",
    "{x} = {y}.bump",
    "{x} = list({y})",
    "{x} = type({y})",
    "Box.count = [{y}]",
    "Box.extra = {y}",
    "def {x}(v={y}): return v, {z}",
    "{x}.tag = {y}",
    "total = [total, {x}]",
    "{x}.append(1); {x} = {y}",
    "{x}.append(2); del {x}",
    "{x} = Sub({y})",
    "{x} = {y}[::-1]",
    "{x} = {y}.reshape(-1)[1:3]",
    "{x} = {y}.view()",
    "{x}[1:] *= 2",
    "class {x}(Box): items = [{y}]",
    "{x}.items.append({y})",
    "{x} = [*{y}]",
    "{x} = {y}, {y}",
    "{x} = collections.deque([{y}])",
    "{x} = collections.defaultdict(list, k={y})",
    "{x} = np.array([{y}, {z}], dtype=object)",
    "{x} = functools.partial(put, {y})",
    "{x}({y})",
    "for {x} in [{y}, {z}]: pass",
    "{x} = [i for i in {y}]; {z} = {x}",
    "{x}.value = [{x}]",
    "globals()['{x}'] = [{y}]",
    "Box.bump = lambda self: {y}",
    "try: {x}.append(1); {y}.foo\nexcept AttributeError as error: {z} = [str(type(error))]",
]


@st.composite
def cells(draw: st.DrawFn) -> tuple[bool, str]:
    count = draw(st.integers(1, 3))
    lines = [
        draw(st.sampled_from(STATEMENTS)).format(x=draw(names), y=draw(names), z=draw(names))
        for _ in range(count)
    ]
    return draw(st.booleans()), "\n".join(lines)


def canonical(ns: dict[str, Any]) -> list[str]:
    """Text of a namespace that shows which objects are the same object."""
    numbers: dict[int, int] = {}
    keep: list[Any] = []

    def show(value: Any) -> str:
        if isinstance(value, types.GenericAlias):
            return repr(value)
        if isinstance(value, (int, float, str, bool, type(None), np.generic)):
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, tuple):
            return f"({', '.join(map(show, value))})"
        if id(value) in numbers:
            return f"#{numbers[id(value)]}"
        numbers[id(value)] = number = len(numbers)
        keep.append(value)
        return f"#{number}={content(value)}"

    def content(value: Any) -> str:
        if isinstance(value, (list, collections.deque)):
            return f"[{', '.join(map(show, value))}]"
        if isinstance(value, dict):
            return f"dict({', '.join(f'{show(k)}: {show(v)}' for k, v in value.items())})"
        if isinstance(value, set):
            return f"set{sorted(map(show, value))}"
        if isinstance(value, np.ndarray):
            items = show(value.tolist()) if value.dtype == object else value.tolist()
            return f"array {value.dtype} {items}"
        if isinstance(value, functools.partial):
            return f"partial {show(value.args)}"
        if isinstance(value, type):
            own = {k: v for k, v in vars(value).items() if not k.startswith("__")}
            own = {k: v for k, v in own.items() if not callable(v) and not hasattr(v, "__get__")}
            return f"class {value.__name__} {content(dict(sorted(own.items())))}"
        if hasattr(value, "__self__"):
            return f"method {value.__func__.__name__} of {show(value.__self__)}"
        if hasattr(value, "__code__"):
            inner = [show(cell.cell_contents) for cell in value.__closure__ or ()]
            return (
                f"function {value.__qualname__} {show(value.__defaults__)} {inner} "
                f"{show(dict(value.__dict__))} globals {value.__globals__ is ns}"
            )
        if hasattr(value, "__slots__"):
            state = {k: getattr(value, k) for k in value.__slots__ if hasattr(value, k)}
        elif hasattr(value, "__dict__"):
            state = vars(value)
        else:
            return repr(value)
        return f"{show(type(value))} {content(state)}"

    return [
        f"{name} = {show(ns[name])}"
        for name in sorted(ns)
        if name not in HIDDEN and name not in ("np", "collections", "functools", "put", "counter")
    ]


def all_local(program: list[tuple[bool, str]]) -> tuple[list[str], dict[str, Any]]:
    ns: dict[str, Any] = {"__name__": "__main__"}
    run_cell(SETUP, ns, "<setup>")
    errors = []
    for index, (_, code) in enumerate(program):
        try:
            run_cell(code, ns, f"<cell {index}>")
        except Exception as error:
            errors.append(type(error).__name__)
        else:
            errors.append("")
    return errors, ns


def alternating(
    program: list[tuple[bool, str]], root: Path, process: subprocess.Popen[bytes]
) -> tuple[list[str], dict[str, Any]]:
    sides = Sides(root, ProcessWorker(process, root / "worker"))
    sides.local(SETUP)
    errors = []
    for remote, code in program:
        error: BaseException | None = None
        if remote:
            error = sides.remote(code).error
        else:
            try:
                sides.local(code)
            except Exception as raised:
                error = raised
        errors.append("" if error is None else type(error).__name__)
    return errors, sides.ns


@pytest.fixture(scope="module")
def process() -> Iterator[subprocess.Popen[bytes]]:
    with worker_process() as process:
        yield process


@settings(max_examples=200, deadline=None)
@given(program=st.lists(cells(), min_size=1, max_size=8))
def test_alternating_equals_local(
    program: list[tuple[bool, str]],
    process: subprocess.Popen[bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    errors, expected = all_local(program)
    got_errors, got = alternating(program, tmp_path_factory.mktemp("sides"), process)
    assert got_errors == errors
    assert canonical(got) == canonical(expected)
