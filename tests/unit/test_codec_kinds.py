"""What becomes of forty kinds of objects that notebooks hold when a cell runs elsewhere."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sides import ProcessWorker, Sides, worker_process

from mlinfra_sdk.errors import NotTransferable

# name: (how it is made, a text that shows that the copy works)
TRAVELS = {
    "lambda": ("f = 2; x = lambda v: v * f", "x(4)"),
    "closure": ("def outer():\n    n = 5\n    return lambda: n\nx = outer()", "x()"),
    "recursive function": ("def x(n): return 1 if n < 2 else n * x(n - 1)", "x(5)"),
    "decorated function": (
        "import functools\ndef deco(g):\n    @functools.wraps(g)\n    def w(*a): return g(*a) + 1\n"
        "    return w\n@deco\ndef x(v): return v",
        "x(1), x.__name__",
    ),
    "generator function": ("def x():\n    yield 1\n    yield 2", "list(x())"),
    "async function": ("async def x(): return 5", "__import__('asyncio').run(x())"),
    "partial": ("import functools\nx = functools.partial(int, base=2)", "x('101')"),
    "bound method": ("class C:\n    def m(self): return 7\nx = C().m", "x()"),
    "notebook class": ("class x:\n    k = 3\n    def m(self): return self.k", "x().m()"),
    "instance": ("class C:\n    def __init__(self): self.v = [1]\nx = C()", "x.v"),
    "dataclass": (
        "import dataclasses as d\n@d.dataclass\nclass P:\n    a: int\n    b: int = 2\nx = P(1)",
        "x.a, x.b, repr(x)",
    ),
    "enum": ("import enum\nclass E(enum.Enum):\n    A = 1\nx = E.A", "x.name, E(1) is x"),
    "named tuple": ("import collections\nP = collections.namedtuple('P', 'a b')\nx = P(1, 2)", "x"),
    "cached function": ("import functools\n@functools.lru_cache\ndef x(v): return v + 1", "x(1)"),
    "single dispatch": (
        "import functools\n@functools.singledispatch\ndef x(v): return 'any'\n"
        "@x.register\ndef _int(v: int): return 'int'",
        "x(1), x('a')",
    ),
    "module": ("import math as x", "x.pi"),
    "regular expression": ("import re; x = re.compile('a(.)', re.I)", "x.match('AB').groups()"),
    "date": ("import datetime; x = datetime.datetime(2024, 1, 2)", "x.isoformat()"),
    "path": ("import pathlib; x = pathlib.Path('/a') / 'b'", "str(x)"),
    "decimal": ("import decimal; x = decimal.Decimal('1.10')", "str(x + 1)"),
    "bytes": ("x = b'a' * 200_000", "len(x), x[:2]"),
    "self-reference": ("x = [1]; x.append(x)", "x[1][1] is x"),
    "iterator": ("x = iter([1, 2, 3]); next(x)", "list(x)"),
    "random generator": ("import random; x = random.Random(5)", "x.random()"),
    "string buffer": ("import io; x = io.StringIO('a\\nb')", "x.getvalue()"),
    "logger": ("import logging; x = logging.getLogger('a.b')", "x.name"),
    "exception": ("x = ValueError('a', 1)", "repr(x)"),
    "weak reference": ("import weakref\nclass C: v = 1\nc = C(); x = weakref.ref(c)", "x().v"),
    "context manager": (
        "import contextlib\n@contextlib.contextmanager\ndef x():\n    yield 3",
        "__import__('contextlib').ExitStack().enter_context(x())",
    ),
    "array": ("import numpy as np; x = np.arange(6.0).reshape(2, 3).T", "x.tolist()"),
    "structured array": (
        "import numpy as np; x = np.zeros(2, dtype=[('a', 'i4'), ('b', 'U3')])",
        "x.dtype.names",
    ),
    "numpy generator": ("import numpy as np; x = np.random.default_rng(3)", "x.random()"),
    "data frame": (
        "import pandas as pd; x = pd.DataFrame({'a': [1, 2], 'b': ['x', None]})",
        "x.to_json()",
    ),
    "categories": ("import pandas as pd; x = pd.Series(['a', 'b'], dtype='category')", "str(x)"),
    "sparse matrix": ("import scipy.sparse as s; x = s.eye(3).tocsr()", "x.sum()"),
    "arrow table": ("import pyarrow as pa; x = pa.table({'a': [1, 2]})", "x.to_pydict()"),
    "tensor": ("import torch; x = torch.arange(3.0, requires_grad=True)", "x.tolist()"),
    "neural network": (
        "import torch; torch.manual_seed(0)\nclass Net(torch.nn.Module):\n    def __init__(self):\n"
        "        super().__init__(); self.l = torch.nn.Linear(2, 2)\n"
        "    def forward(self, v): return self.l(v)\nx = Net()",
        "x(torch.ones(2)).tolist()",
    ),
    "data set and loader": (
        "import torch\nfrom torch.utils.data import DataLoader, TensorDataset\n"
        "x = DataLoader(TensorDataset(torch.arange(4)), batch_size=2)",
        "[b[0].tolist() for b in x]",
    ),
    "scikit-learn model": (
        "from sklearn.linear_model import LinearRegression\nx = LinearRegression().fit([[0], [1]],"
        " [1, 3])",
        "float(round(x.predict([[2]])[0], 6))",
    ),
    "figure": (
        "import matplotlib; matplotlib.use('agg'); from matplotlib.figure import Figure\n"
        "x = Figure(); _ax = x.add_subplot(); _ax.plot([1, 2])",
        "len(x.axes[0].lines)",
    ),
    "widget": (
        "import ipywidgets\nx = ipywidgets.IntSlider(value=3, description='depth')\nseen = []\n"
        "x.observe(lambda change: seen.append(change.new), 'value')",
        "setattr(x, 'value', 5), seen, x.value, x.description, x.comm is None",
    ),
}  # fmt: skip

# Arrive as new objects of their kind, and are the original again when they return.
FRESH = {
    "lock": ("import threading; x = threading.Lock()", "x.acquire(False)"),
    "reentrant lock": ("import threading; x = threading.RLock()", "x.acquire(False)"),
    "event": ("import threading; x = threading.Event()", "x.is_set()"),
    "queue": ("import queue; x = queue.Queue(); x.put(1)", "x.get_nowait()"),
}

# Do not travel: any use is an error that names them, and nothing is lost at home.
STAYS = {
    "generator": ("x = (i for i in range(3))", "next(x)"),
    "coroutine": ("async def c(): return 1\nx = c()", "x.send(None)"),
    "open file": ("x = open('/dev/null')", "x.read()"),
    "socket": ("import socket; x = socket.socket()", "x.fileno()"),
    "database connection": ("import sqlite3; x = sqlite3.connect(':memory:')", "x.execute('')"),
    "thread": ("import threading; x = threading.Thread(target=print)", "x.start()"),
    "process": ("import subprocess; x = subprocess.Popen(['true']); x.wait()", "x.poll()"),
    "pool": ("import concurrent.futures as c; x = c.ThreadPoolExecutor(1)", "x.submit(print)"),
    "thread-local": ("import threading; x = threading.local()", "x.a"),
    "context variable": ("import contextvars; x = contextvars.ContextVar('x')", "x.get()"),
    "frame": ("import sys; x = sys._getframe()", "x.f_code"),
    "memory map": ("import mmap; x = mmap.mmap(-1, 10)", "x[0]"),
    "temporary file": ("import tempfile; x = tempfile.NamedTemporaryFile()", "x.name"),
    "event loop": ("import asyncio; x = asyncio.new_event_loop()", "x.time()"),
}


@pytest.fixture(scope="module")
def process() -> Iterator[subprocess.Popen[bytes]]:
    with worker_process() as process:
        yield process


@pytest.fixture
def sides(process: subprocess.Popen[bytes], tmp_path: Path) -> Sides:
    return Sides(tmp_path, ProcessWorker(process, tmp_path / "worker"))


def run(sides: Sides, check: str) -> Any:
    report = sides.remote(f"shown = repr(({check}))")
    assert report.error is None, report.error
    return sides.ns["shown"]


@pytest.mark.parametrize("kind", TRAVELS)
def test_travels(sides: Sides, kind: str) -> None:
    code, check = TRAVELS[kind]
    other = Sides(sides.store.root.parent / "other")
    other.local(code)
    expected = repr(other.local(check))
    sides.local(code)
    assert run(sides, check) == expected


@pytest.mark.parametrize("kind", TRAVELS)
def test_is_made_there_and_returns(sides: Sides, kind: str) -> None:
    code, check = TRAVELS[kind]
    other = Sides(sides.store.root.parent / "other")
    other.local(code)
    expected = repr(other.local(check))
    report = sides.remote(code)
    assert report.error is None and report.remote == [] and report.warnings == []
    assert repr(sides.local(check)) == expected


@pytest.mark.parametrize("kind", FRESH)
def test_arrives_fresh(sides: Sides, kind: str) -> None:
    code, check = FRESH[kind]
    sides.local(code)
    original = sides.ns["x"]
    other = Sides(sides.store.root.parent / "other")
    other.local(code)
    assert run(sides, check) == repr(other.local(check))
    report = sides.remote("holder = [x]")
    assert report.warnings == [] and sides.ns["holder"][0] is original


@pytest.mark.parametrize("kind", STAYS)
def test_stays(sides: Sides, kind: str) -> None:
    code, use = STAYS[kind]
    sides.local(code + "\ny = 1")
    original = sides.ns["x"]
    assert sides.remote("y; x; z = [x]").error is None
    assert sides.ns["x"] is original and sides.ns["z"][0] is original
    assert isinstance(sides.remote(use).error, (NotTransferable, AttributeError))


@pytest.mark.parametrize("kind", STAYS)
def test_is_made_there_and_stays_there(sides: Sides, kind: str) -> None:
    code, _ = STAYS[kind]
    report = sides.remote(code)
    assert report.error is None and report.remote == ["x"]
    with pytest.raises(NotTransferable, match="'x'"):
        sides.ns["x"].pull()
    sides.remote("same = x is y" if "y" in sides.ns else "same = x is x")
    assert sides.ns["same"]


def test_a_widget_has_one_twin_on_each_side(sides: Sides) -> None:
    """It is one widget, with the model that the front end knows, whoever changes it."""
    sides.local("import ipywidgets; x = ipywidgets.IntSlider(value=3); box = ipywidgets.HBox([x])")
    original, model = sides.ns["x"], sides.ns["x"].model_id
    report = sides.remote(
        "model, same = x.model_id, box.children[0] is x\n"
        "x.value = 7\nbox.children = [x, ipywidgets.Text('new')]"
    )
    assert report.error is None and report.warnings == []
    assert (sides.ns["model"], sides.ns["same"]) == (model, True)
    assert sides.ns["x"] is original and original.value == 7
    assert sides.ns["box"].children[0] is original
    assert sides.ns["box"].children[1].value == "new"
    original.value = 4
    assert run(sides, "x.value") == "4"
    sides.remote("x.close()")
    assert original.comm is None
    assert run(sides, "x.comm") == "None"
