from __future__ import annotations

import builtins
import sys
import textwrap
import warnings
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.inputtransformer2 import TransformerManager

from mlinfra_sdk.namespace.analysis import CellNames, cell_names

NAMES = frozenset("abcdefghijklmnopqrstuvwxyz") | {
    *("df", "X", "Y", "model", "pattern", "thresh", "Foo", "Base", "deco", "_", "__", "_3", "Out"),
    *("In", "result", "counter", "path", "count", "os", "__name__", "ls", "inline", "tmp"),
}


def analyse(cell: str) -> CellNames:
    code = TransformerManager().transform_cell(textwrap.dedent(cell))
    return cell_names(code, NAMES, cell)


READS = {
    # plain flow
    "print(x)": "x",
    "X = 1; X.mean()": "",
    "x += 1": "x",
    "x = x + 1": "x",
    "x.y = 1": "x",
    "x[i] = j": "x i j",
    "x[i] += j": "x i j",
    "del x": "x",
    "x = 1\ndel x": "",
    "x = 1\ndel x\nx": "x",
    "a, (b, *c) = d\na, b, c": "d",
    "for x in x: pass": "x",
    "for i in range(3): y = i\nprint(y, i)": "y i",
    "for i in x: y = i; print(y)": "x",
    "for i in x:\n    break\nelse:\n    y = 1\ny": "x y",
    "while c: x = 1\nx": "c x",
    "while True:\n    x = f()\n    if x: break\nx": "f x",
    "if c: x = 1\nprint(x)": "c x",
    "if c: x = 1\nelse: x = 2\nprint(x)": "c",
    "if c: x = 1\nelse: raise ValueError\nprint(x)": "c",
    "x = a if c else b": "a b c",
    "c and (y := a)\ny": "a c y",
    "if (n := len(a)) > 10: print(n)": "a",
    "with open(p) as f: f.read()": "p",
    "with a as b: x = 1\nx": "a x",
    "with a as (b, c.d): b": "a c",
    "try:\n    import torch\nexcept ImportError:\n    e = 1\nelse:\n    x = 2\nx, e": "x e",
    "try: x = f()\nexcept E as e: print(e)\nx, e": "f x e",
    "try: x = f()\nexcept E: raise\nx": "f",
    "try: x = f()\nexcept E: x = 1\nx": "f",
    "try: pass\nfinally: x = 1\nx": "",
    "try: x = 1\nfinally: print(x)": "x",
    "assert a, b": "a b",
    "raise a from b": "a b",
    "import a.b as c, d.e\nc, d, a": "a",
    "from m import *\nx": "x",
    "x: a = b\nx": "a b",
    "x: a\nx": "a x",
    "x: 'a | b'": "a b",
    'f"{x=} {y!r:>{w}}"': "x y w",
    "lambda a, b=b: a + c": "b c",
    "await f(x)": "f x",
    "async for i in a: print(i)": "a",
    "async with a as b: b": "a",
    "[await f(i) async for i in a]": "f a",
    "_ + __ + _3 + Out[2] + In[1]": "_ __ _3 Out In",
    "for _ in range(3): pass": "",
    "__name__": "",
    "x if x else y": "x y",
    # comprehensions
    "[a for a in b]": "b",
    "[a for a in a]": "a",
    "[a + b for b in c for a in b if d]": "c d",
    "{k: v for k, v in d.items()}; k": "d k",
    "any((y := i) for i in a)\ny": "a y",
    "[[j for j in i] for i in a]": "a",
    # functions and classes
    "def f(): return x\n": "x",
    "x = 1\ndef f(): return x": "",
    "def f(n): return f(n - 1)": "",
    "def f(a, *b, c=d, **e): a, b, c, e": "d",
    "def f():\n    x = 1\n    return x": "",
    "def f():\n    print(x)\n    x = 1": "",
    "def f():\n    global counter\n    counter += 1": "counter",
    "def f():\n    global x\n    x = 1\nf()\nx": "x",
    "def f():\n    x = 1\n    def g():\n        nonlocal x\n        x += y\n    return g": "y",
    "def f():\n    for i in a: pass\n    with b as c: pass\n    i, c": "a b",
    "def f():\n    import d, e.f\n    d, e": "",
    "def f():\n    try: pass\n    except E as e: print(e)\n    [i for i in (w := a)]\n    w": "a",
    "def f():\n    def g(): return h()\n    class C: pass\n    return g, C": "h",
    "@deco(a)\ndef f(x: b = c) -> d: pass": "deco a b c d",
    "@deco\nclass Foo(Base, metaclass=m): pass": "deco Base m",
    "class Foo:\n    x = 1\n    y = x\n    def f(self): return x": "x",
    "class Foo:\n    x = x": "x",
    "class Foo:\n    def make(self): return Foo()": "",
    "class Foo(Foo): pass": "Foo",
    "class Foo:\n    if c: x = 1\n    y = x": "c x",
    "class Foo:\n    x = 1\n    y = [x for i in range(3)]": "x",
    "class Foo:\n    a: 'b'\n    c: d = e": "b d e",
    "f = lambda: x\nx = 1": "x",
    # match
    "match x:\n    case [a, *b]: print(a, b)\n    case Foo(y=e): e": "x Foo",
    "match x:\n    case {'k': c, **d}: c, d": "x",
    "match x:\n    case a.b: y = 1\n    case _: y = 2\ny": "x a",
    "match x:\n    case 1: y = 1\ny": "x y",
    "match x:\n    case a if b: y = 1\ny": "x b y",
    # code in strings
    "exec('y = x + 1')\ny": "x",
    "eval('a + b')": "a b",
    "exec('for broken x')": "x",
    "def f(x): eval('[x for i in a]')": "x i a",
    "df.query('a > @thresh')": "df a thresh",
    "df.eval('q = a + @b', inplace=True)": "df q a b",
    "q = 'select * from df'\nduckdb.sql(q)": "df",
    "ols('y ~ f(x)', data=df)": "y f x df",
    "model.eval()": "model",
    "globals()['x']": "x",
    "globals()['x'] = y": "y",
    "'x' in globals()": "x",
    "'x' not in locals()": "x",
    "globals().get('x', y)": "x y",
    "get_ipython().user_ns['x']": "x",
    "def f(): return locals(), vars(), dir()": "",
    "dir(x), vars(y)": "x y",
    "if __name__ == '__main__': f()": "f",
    "from __main__ import x": "x",
    # IPython
    "x = !ls {pattern} $path": "pattern path",
    "!ls tmp": "",
    "!!echo {x}": "x",
    "%timeit f(x)": "f x",
    "%timeit -n 10 -r3 f(x)": "f x",
    "%time y = f(x)\ny": "f x",
    "%%time\ny = f(x)\ny": "f x",
    "%%time\nx = !echo {a}\n%timeit g(x)": "a g",
    "%%timeit a = b\nf(a)": "b f",
    "%%capture c\nprint(x)": "x",
    "%%bash -s $x {y}\necho $a {b} c": "x y",
    "%%bash\nls tmp": "",
    "%%writefile {path}\nx = y": "path",
    "%matplotlib inline": "",
    "%cd {path}": "path",
    "%env A={x}": "x",
    "df?": "df",
    "?df.mean": "df",
    "%lprun -f f g(x)": "f g x",
    "%%sql\nselect * from df": "df",
    "%xdel x": "x",
    "%run tmp.py {x}": "x",
    # no Python
    "for broken x": "x",
    "x = \x00": "x",
    "": "",
}


@pytest.mark.parametrize("cell", READS, ids=repr)
def test_reads(cell: str) -> None:
    found = analyse(cell)
    assert found.reads == set(READS[cell].split())
    assert not found.everything


@pytest.mark.skipif(sys.version_info < (3, 12), reason="syntax of Python 3.12")
@pytest.mark.parametrize(
    ("cell", "reads"),
    [
        ("type X[T] = list[T] | a\nX", "a"),
        ("def f[T: a](x: T) -> T:\n    y: T = b", "a b"),
        ("class Foo[T](Base[T]):\n    def f(self) -> T: return x", "Base x"),
        ("f\"{x!r} {'a' + f'{y}'}\"", "x y"),
    ],
)
def test_type_parameters(cell: str, reads: str) -> None:
    found = analyse(cell)
    assert found.reads - {"T"} == set(reads.split())


@pytest.mark.parametrize(
    "cell",
    [
        "globals()",
        "locals()",
        "vars()",
        "dir()",
        "def f(): return globals()",
        "for n in globals(): pass",
        "n in globals()",
        "globals().update(a=1)",
        "get_ipython().user_ns",
        "sys._getframe().f_globals",
        "f.__globals__",
        "import __main__",
        "from __main__ import *",
        "sys.modules['__main__']",
        "exec(code)",
        "exec(open(p).read())",
        "eval(f'a{i}')",
        "%who",
        "%whos DataFrame",
        "%store x",
        "%reset -f",
        "%rerun 3",
        "%run -i tmp.py",
        "%run other.ipynb",
        "%%time\nglobals()",
    ],
)
def test_everything(cell: str) -> None:
    assert analyse(cell).everything


@pytest.mark.parametrize(
    ("cell", "binds", "deletes"),
    [
        ("x = y = 1; z += 1", "x y z", ""),
        ("import a.b, c.d as e\nfrom m import f as g, h", "a e g h", ""),
        ("for i, (j, k) in x: pass", "i j k", ""),
        ("def f(): a = 1\nclass Foo: b = 1", "f Foo", ""),
        ("def f():\n    global a, b\n    a = 1\n    del b", "f a", "b"),
        ("[(y := i) for i in x]", "y", ""),
        ("with a as b: pass\ntry: pass\nexcept E as e: pass", "b e", ""),
        ("match x:\n    case [a, *b]: pass\n    case {**c}: pass", "a b c", ""),
        ("del a, b.c, d[0]", "", "a"),
        ("globals()['x'] = 1", "x", ""),
        ("exec('x = 1')", "x", ""),
        ("%time y = 1", "y", ""),
        ("%%capture out\nx = 1", "out x", ""),
        ("x = !ls", "x", ""),
        ("%xdel x", "", "x"),
    ],
)
def test_binds_and_deletes(cell: str, binds: str, deletes: str) -> None:
    found = analyse(cell)
    assert found.binds == set(binds.split())
    assert found.deletes == set(deletes.split())


def test_raw_text_is_used_where_the_code_is_broken() -> None:
    assert cell_names("(", {"x", "y"}, "x y z").reads == {"x", "y"}


def test_only_available_names_are_read() -> None:
    assert cell_names("print(x, y)", {"y": 1}).reads == {"y"}


def test_no_warnings_and_no_side_effects_on_them(capsys: pytest.CaptureFixture[str]) -> None:
    show, version = warnings.showwarning, warnings.filters[:]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        found = cell_names("x = '\\d'; y is 1", {"y"})
    assert found.reads == {"y"}
    assert capsys.readouterr().err == ""
    assert warnings.showwarning is show
    assert warnings.filters == version


def test_deep_nesting_is_no_error() -> None:
    assert "x" in cell_names("-" * 20_000 + "x", {"x"}).reads


# Soundness: what a random program really reads of the old names must have been found.

VARIABLES = "abcd"
expressions = st.recursive(
    st.sampled_from([*VARIABLES, "1"]),
    lambda inner: st.one_of(
        st.builds("({} + {})".format, inner, inner),
        st.builds("({} and {})".format, inner, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("({} := {})".format, st.sampled_from(VARIABLES), inner),
        st.builds("len([{} for {} in [0, 1]])".format, inner, st.sampled_from(VARIABLES)),
        st.builds("(lambda {}={}: {})()".format, st.sampled_from(VARIABLES), inner, inner),
        st.builds("eval({!r})".format, inner),
    ),
    max_leaves=4,
)


def _block(*parts: str) -> str:
    return "\n".join(textwrap.indent(part, "    ") for part in parts)


def _compound(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    body = st.lists(inner, min_size=1, max_size=3).map(lambda parts: _block(*parts))
    name = st.sampled_from(VARIABLES)
    return st.one_of(
        st.builds("if {}:\n{}\nelse:\n{}".format, expressions, body, body),
        st.builds("for {} in range({} % 3):\n{}".format, name, expressions, body),
        st.builds("try:\n{}\nexcept Exception as {}:\n{}\n".format, body, name, body),
        st.builds("try:\n{}\nfinally:\n{}".format, body, body),
        st.builds("with suppress(Exception) as {}:\n{}".format, name, body),
        st.builds("def f({}):\n{}\nf(1)".format, name, body),
        st.builds("def f():\n    global {}\n{}\nf()".format, name, body),
        st.builds("class C:\n{}".format, body),
        st.builds("match {}:\n  case 0 | False:\n{}\n  case {}:\n{}".format,
                  expressions, body, name, body),
    )  # fmt: skip


statements = st.recursive(
    st.one_of(
        st.builds("{} = {}".format, st.sampled_from(VARIABLES), expressions),
        st.builds("{} += {}".format, st.sampled_from(VARIABLES), expressions),
        st.builds("del {}".format, st.sampled_from(VARIABLES)),
        st.builds(
            "exec({!r})".format,
            st.builds("{} = {}".format, st.sampled_from(VARIABLES), expressions),
        ),
        st.just("raise ValueError"),
    ),
    _compound,
    max_leaves=6,
)


class Recorder(dict[str, Any]):
    """A namespace that notes which of its first values are read or deleted."""

    def __init__(self, names: str) -> None:
        # Big numbers: no two of them, nor a result, are the same object.
        self.first = {name: 1000 + index for index, name in enumerate(names)}
        super().__init__(self.first)
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if value is self.first.get(name):
            self.used.add(name)
        return value

    def __delitem__(self, name: str) -> None:
        if name in self:
            _ = self[name]
        super().__delitem__(name)


@settings(max_examples=200, deadline=None)
@given(st.lists(statements, min_size=1, max_size=5).map("\n".join))
def test_every_real_read_is_found(program: str) -> None:
    try:
        code = compile(program, "<program>", "exec")
    except SyntaxError:  # a name that is a parameter and global, a walrus on an iteration variable
        return
    namespace = Recorder(VARIABLES)
    namespace.update({"suppress": suppress, "__builtins__": builtins})
    with suppress(Exception):
        exec(code, namespace)
    assert namespace.used <= cell_names(program, frozenset(VARIABLES)).reads
