from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from sides import HIDDEN, ProcessWorker, Sides, worker_process

from mlinfra_sdk.errors import NotTransferable
from mlinfra_sdk.namespace.analysis import CellNames
from mlinfra_sdk.namespace.graphs import from_runs, to_runs
from mlinfra_sdk.namespace.sync import Inputs, Outputs, RemoteValue
from mlinfra_sdk.objects.store import CHUNK_SIZE


@pytest.fixture
def sides(tmp_path: Path) -> Sides:
    return Sides(tmp_path)


# What is sent


def test_an_empty_delta_is_one_byte() -> None:
    assert len(msgspec.msgpack.encode(Inputs())) == 1
    assert len(msgspec.msgpack.encode(Outputs())) == 1


def test_only_what_a_cell_needs_is_sent(sides: Sides) -> None:
    sides.local("k = 1\nm = 2\nunused = 3\ndef g(): return k\ndef f(): return g() + m")
    assert sides.remote("f()").extra == {"_": 3}
    assert sorted(sides.inputs.names) == ["f", "g", "k", "m"]
    assert "unused" not in sides.worker.ns


def test_what_the_worker_has_is_not_sent_again(sides: Sides) -> None:
    sides.local("import numpy as np; a = np.arange(1_000_000); l = [a, {1: 'x'}]; n = 5")
    sides.remote("len(l), n")
    assert sides.moved >= 8_000_000
    moved = sides.moved
    assert sides.remote("len(l), n").extra == {"_": (2, 5)}
    assert sides.inputs.groups == [] and sides.moved == moved


def test_only_changed_chunks_move(sides: Sides) -> None:
    sides.local("import numpy as np; a = np.random.default_rng(0).random(4_000_000)")
    sides.remote("a[0]")
    moved = sides.moved
    sides.local("a[1_000_000] = 5")
    assert sides.remote("a[1_000_000]").extra == {"_": 5.0}
    assert sides.moved - moved <= CHUNK_SIZE
    moved = sides.moved
    array = sides.ns["a"]
    sides.remote("a[2_000_000] = 7")
    assert sides.moved - moved <= CHUNK_SIZE
    assert sides.ns["a"] is array and array[2_000_000] == 7


def test_deleted_variables_are_deleted_over_there(sides: Sides) -> None:
    sides.local("a = 1")
    sides.remote("a")
    sides.local("del a")
    assert type(sides.remote("a").error) is NameError


def test_a_name_is_looked_for_in_the_text_of_the_cell_only(sides: Sides) -> None:
    sides.local("a = 1\nb = 2")
    names = CellNames(reads=set(), binds=set(), deletes=set(), everything=True)
    assert sorted(sides.namespace.prepare(names).names) == ["a", "b"]


def test_submodules_that_the_code_reaches_are_imported(sides: Sides) -> None:
    sides.local("import xml.dom.minidom\nimport json")
    sides.remote("xml.dom.minidom.parseString('<a/>')")
    assert sides.inputs.imports == ["xml.dom", "xml.dom.minidom"]


def test_values_for_a_call(sides: Sides) -> None:
    sides.local("k = 2\ndef f(x): return x * k")
    inputs = sides.namespace.prepare_values({"__fn__": sides.ns["f"], "__args__": (21,)})
    sides.worker.namespace.load(inputs)
    assert eval("__fn__(*__args__)", sides.worker.ns) == 42
    sides.namespace.apply(sides.worker.namespace.collect())
    assert "__fn__" not in sides.ns


# What comes back


def test_bound_deleted_and_mutated_variables_come_back(sides: Sides) -> None:
    sides.local("a = [1]; b = 2; c = {'k': 1}; d = 4")
    report = sides.remote("a.append(2); b = 3; e = 5; del c, d")
    assert sorted(report.changed) == ["a", "b", "e"] and sorted(report.deleted) == ["c", "d"]
    user = {name: value for name, value in sides.ns.items() if name not in HIDDEN}
    assert user == {"a": [1, 2], "b": 3, "e": 5}


def test_an_unchanged_variable_does_not_come_back(sides: Sides) -> None:
    sides.local("import numpy as np; a = [1, {2: 3}, {4}, np.arange(5)]; s = {'x', 'y'}")
    assert sides.remote("str(a), len(s)").changed == []
    assert sides.outputs.groups[0].names == ["=_"]


def test_aliases_stay_aliases(sides: Sides) -> None:
    sides.local("a = [1]; b = {'a': a}; c = b")
    a, b = sides.ns["a"], sides.ns["b"]
    sides.remote("c['a'].append(2); d = a")
    assert sides.ns["a"] is a and sides.ns["b"] is b and sides.ns["c"] is b
    assert a == [1, 2] and b["a"] is a and sides.ns["d"] is a


def test_an_alias_that_the_cell_does_not_name_sees_the_change(sides: Sides) -> None:
    sides.local("a = [1]; b = {'a': a}")
    sides.remote("a, b")
    sides.remote("a.append(2)")
    assert sides.ns["b"] == {"a": [1, 2]}
    assert sides.remote("b['a'] is a and len(a)").extra == {"_": 2}


def test_the_former_value_of_a_rebound_variable_is_updated(sides: Sides) -> None:
    sides.local("a = [1]; alias = a; b = [2]; other = b")
    sides.remote("a.append(5); a = 0; b.append(6); del b")
    assert sides.ns["alias"] == [1, 5] and sides.ns["other"] == [2, 6]
    assert sides.ns["a"] == 0 and "b" not in sides.ns


def test_the_value_of_the_cell_is_the_variable(sides: Sides) -> None:
    sides.local("x = [1]")
    assert sides.remote("x").extra["_"] is sides.ns["x"]
    assert sides.remote("y = {}; y").extra["_"] is sides.ns["y"]


def test_global_statements_in_notebook_functions(sides: Sides) -> None:
    sides.local("total = 0\ndef add(n):\n    global total\n    total += n")
    sides.remote("add(3); add(4)")
    assert sides.ns["total"] == 7
    sides.local("add(1)")
    assert sides.remote("total").extra == {"_": 8}


def test_redefining_a_function_matters_to_its_callers(sides: Sides) -> None:
    sides.local("def g(): return 1\ndef f(): return g()")
    assert sides.remote("f()").extra == {"_": 1}
    sides.local("def g(): return 2")
    assert sides.remote("f()").extra == {"_": 2}
    sides.remote("def g(): return 3")
    assert sides.local("f()") == 3


def test_a_changed_function_is_changed_wherever_it_is_referred_to(sides: Sides) -> None:
    sides.local("def f(): return f.n\nf.n = 1\ncallbacks = [f]")
    assert sides.remote("callbacks[0]()").extra == {"_": 1}
    sides.local("f.n = 2")
    assert sides.remote("callbacks[0]() , callbacks[0] is f").extra == {"_": (2, True)}


def test_views_of_arrays_stay_views(sides: Sides) -> None:
    sides.local("import numpy as np; a = np.arange(10)")
    sides.remote("v = a[2:5]; v[0] = 77; w = v[::-1]")
    sides.local("v[1] = 88; w[0] = 99")
    assert sides.ns["a"].tolist() == [0, 1, 77, 88, 99, 5, 6, 7, 8, 9]
    assert sides.ns["v"].base is not None and sides.remote("int(a[3])").extra == {"_": 88}


def test_views_of_tensors_stay_views(sides: Sides) -> None:
    pytest.importorskip("torch")
    sides.local("import torch; t = torch.zeros(6); m = torch.nn.Linear(2, 2)")
    sides.remote("v = t[1:3]; v += 1; row = m.weight.data[0]")
    sides.local("v[1] = 5; row.fill_(3)")
    assert sides.ns["t"].tolist() == [0, 1, 5, 0, 0, 0]
    assert sides.ns["m"].weight[0].tolist() == [3, 3]


def test_training_continues_on_either_side(sides: Sides) -> None:
    torch = pytest.importorskip("torch")
    sides.local(
        "import torch\n"
        "torch.manual_seed(0)\n"
        "m = torch.nn.Linear(3, 1)\n"
        "o = torch.optim.Adam(m.parameters())\n"
        "x = torch.ones(2, 3)\n"
        "def step():\n"
        "    o.zero_grad(); loss = m(x).sum(); loss.backward(); o.step(); return loss.item()\n"
    )
    weight = sides.ns["m"].weight
    losses = [
        sides.remote("step()").extra["_"] if i % 2 else sides.local("step()") for i in range(6)
    ]
    torch.manual_seed(0)
    ns: dict[str, Any] = {}
    exec(
        "import torch\n"
        "m = torch.nn.Linear(3, 1)\n"
        "o = torch.optim.Adam(m.parameters())\n"
        "x = torch.ones(2, 3)\n"
        "losses = []\n"
        "for _ in range(6):\n"
        "    o.zero_grad(); loss = m(x).sum(); loss.backward(); o.step()\n"
        "    losses.append(loss.item())\n",
        ns,
    )
    assert losses == ns["losses"]
    assert sides.ns["m"].weight is weight and torch.equal(weight, ns["m"].weight)


def test_data_frames_keep_their_identity(sides: Sides) -> None:
    pytest.importorskip("pandas")
    sides.local("import pandas as pd; df = pd.DataFrame({'a': [1, 2], 'b': ['x', 'y']}); d2 = df")
    df = sides.ns["df"]
    assert sides.remote("df.sum()").changed == []
    sides.remote("df['c'] = df.a * 2; df.loc[0, 'b'] = 'z'")
    assert sides.ns["df"] is df and sides.ns["d2"] is df
    assert df.to_dict("list") == {"a": [1, 2], "b": ["z", "y"], "c": [2, 4]}


# After an error


def test_an_error_keeps_what_changed_before_it(sides: Sides) -> None:
    sides.local("a = []\nclass E(Exception): pass")
    report = sides.remote("a.append(1); b = 2; raise E('text')")
    assert type(report.error) is sides.ns["E"] and report.error.args == ("text",)
    assert sides.ns["a"] == [1] and sides.ns["b"] == 2


def test_an_error_of_a_class_of_the_cell(sides: Sides) -> None:
    report = sides.remote("class E(Exception): pass\nraise E(1)")
    assert type(report.error) is sides.ns["E"]


def test_an_error_that_cannot_travel_is_left_out(sides: Sides) -> None:
    report = sides.remote("a = 1\nclass E(Exception):\n    def __reduce__(self): 1 / 0\nraise E")
    assert not isinstance(report.error, ZeroDivisionError) and sides.ns["a"] == 1


# What does not travel


def test_what_cannot_be_sent_is_an_error_only_if_it_is_used(sides: Sides) -> None:
    sides.local("g = (i for i in range(3)); a = [g, 1]")
    assert sides.remote("a[1]").error is None
    error = sides.remote("next(a[0])").error
    assert isinstance(error, NotTransferable) and "generator" in str(error)
    assert sides.local("next(a[0])") == 0
    generator = sides.ns["g"]
    sides.remote("a.append(2)")
    assert sides.ns["a"] == [generator, 1, 2] and sides.ns["a"][0] is generator


def test_a_generator_made_remotely_stays_and_works_there(sides: Sides) -> None:
    report = sides.remote("g = (i * i for i in range(5)); next(g)")
    assert report.remote == ["g"] and type(sides.ns["g"]) is RemoteValue
    with pytest.raises(NotTransferable, match="'g' cannot be used here: a generator"):
        next(sides.ns["g"])
    sides.local("h = g")
    assert sides.remote("next(h)").extra == {"_": 1}
    assert sides.remote("next(g)").extra == {"_": 4}


def test_parts_that_cannot_come_back_are_reported(sides: Sides) -> None:
    report = sides.remote("a = [1, (i for i in range(3))]")
    assert sides.ns["a"][0] == 1
    assert report.warnings == ["a generator (in 'a') stays on the machine."]
    assert sides.remote("next(a[1])").extra == {"_": 0}


def test_what_cannot_be_rebuilt_here_stays_there(tmp_path: Path) -> None:
    with worker_process() as process:
        sides = Sides(tmp_path, ProcessWorker(process, tmp_path / "worker"))
        report = sides.remote(
            "import sys, types\n"
            "module = types.ModuleType('only_there')\n"
            "exec('class Thing:\\n    v = 5', module.__dict__)\n"
            "sys.modules['only_there'] = module\n"
            "thing = module.Thing()\n"
            "ok = 1\n"
        )
        assert sides.ns["ok"] == 1 and "thing" in report.remote
        assert "only_there" in repr(sides.ns["thing"])
        assert any("'thing'" in text for text in report.warnings)
        assert sides.remote("thing.v").extra == {"_": 5}


def test_what_cannot_be_rebuilt_there_is_tried_again(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "only_here_mod.py").write_text("class Thing:\n    v = 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    with worker_process() as process:
        sides = Sides(tmp_path, ProcessWorker(process, tmp_path / "worker"))
        sides.local("from only_here_mod import Thing; thing = Thing(); ok = 1")
        assert sides.remote("ok; thing; 1").error is None
        error = sides.remote("thing.v").error
        assert isinstance(error, NotTransferable) and "only_here_mod" in str(error)
        assert sides.ns["thing"].v == 5
        sides.remote(f"import sys; sys.path.append({str(tmp_path)!r})")
        assert sides.remote("thing.v").extra == {"_": 5}


def test_a_class_that_fights_pickle_does_not_break_the_rest(sides: Sides) -> None:
    sides.local(
        "class Bad:\n"
        "    def __reduce_ex__(self, p): raise KeyboardInterrupt if False else RuntimeError\n"
        "    def __eq__(self, other): raise RuntimeError\n"
        "    __hash__ = None\n"
        "    @property\n"
        "    def shape(self): raise RuntimeError\n"
        "    def __del__(self): raise RuntimeError\n"
        "bad = Bad(); good = [1]\n"
    )
    report = sides.remote("good.append(2); worse = Bad(); b = [Bad()]")
    assert sides.ns["good"] == [1, 2] and report.remote == ["worse"]
    sides.ns["bad"].__class__.__del__ = lambda self: None


# States


def test_a_lost_cell_makes_everything_be_sent_again(sides: Sides) -> None:
    sides.local("a = [1]")
    sides.remote("a")
    sides.namespace.prepare(CellNames(reads={"a"}, binds=set(), deletes=set(), everything=False))
    sides.remote("a")
    assert [group.names for group in sides.inputs.groups] == [["a"]]


def test_an_interrupt_while_applying_leaves_a_consistent_state(tmp_path: Path) -> None:
    with worker_process() as process:
        sides = Sides(tmp_path, ProcessWorker(process, tmp_path / "worker"))
        sides.local(
            "class Slow:\n"
            "    def __setstate__(self, state):\n"
            "        if state['x'] == 2 and armed: raise KeyboardInterrupt\n"
            "        vars(self).update(state)\n"
            "armed = False; a = [1]; s = Slow(); s.x = 1"
        )
        sides.remote("s; a")
        sides.local("armed = True")
        with pytest.raises(KeyboardInterrupt):
            sides.remote("a.append(2); s.x = 2")
        sides.local("armed = False")
        expected = len(sides.ns["a"]), sides.ns["s"].x
        assert sides.remote("len(a), s.x").extra["_"] == expected


def test_after_forget_everything_is_sent_again(tmp_path: Path) -> None:
    sides = Sides(tmp_path)
    sides.local("a = [1]; import numpy as np")
    sides.remote("a.append(2); np")
    fresh = Sides(tmp_path)
    sides.worker = fresh.worker
    sides.namespace.forget()
    assert sides.remote("len(a)").extra == {"_": 2}


def test_overwritten_values_can_be_freed_during_the_cell(sides: Sides) -> None:
    sides.local("import numpy as np; a = np.zeros(300_000)")
    sides.remote("a")
    ref = weakref.ref(sides.worker.ns["a"])
    inputs = sides.namespace.prepare(
        CellNames(reads=set(), binds={"a"}, deletes=set(), everything=False)
    )
    sides.worker.namespace.load(inputs)
    gc.collect()
    assert ref() is None


def test_nothing_is_kept_alive_here(sides: Sides) -> None:
    sides.local("import numpy as np; a = np.zeros(300_000); l = [a]")
    sides.remote("a[0] = 1; l")
    ref = weakref.ref(sides.ns["a"])
    sides.local("del a, l")
    gc.collect()
    assert ref() is None


def test_values_of_any_size_can_be_asked_for(sides: Sides) -> None:
    sides.namespace.eager_limit = 1000
    sides.remote("import numpy as np; big = np.arange(100_000); other = big[:3]")
    assert type(sides.ns["big"]) is RemoteValue
    sides.namespace.apply(sides._receive(msgspec.msgpack.encode(
        sides.worker.namespace.values(["big"])
    )))  # fmt: skip
    assert np.array_equal(sides.ns["big"], np.arange(100_000))
    with pytest.raises(KeyError):
        sides.worker.namespace.values(["unknown"])


def test_runs_are_compact() -> None:
    pairs = [(3, 3), (4, 4), (5, 5), (9, 7), (10, 8), (12, 9)]
    assert to_runs(reversed(pairs)) == [3, 3, 3, 9, 7, 2, 12, 9, 1]
    assert list(from_runs(to_runs(pairs))) == pairs


# Two processes


def test_classes_defined_on_either_side_stay_themselves(tmp_path: Path) -> None:
    with worker_process() as process:
        sides = Sides(tmp_path, ProcessWorker(process, tmp_path / "worker"))
        sides.local("class A:\n    made = 0\n    def __init__(self): A.made += 1\na = A()")
        a, cls = sides.ns["a"], sides.ns["A"]
        sides.remote("a2 = A(); same = type(a) is A is type(a2)\nclass B(A): pass\nb = B()")
        assert sides.ns["same"] and type(sides.ns["a2"]) is cls and cls.made == 3
        assert isinstance(sides.ns["b"], cls) and type(sides.ns["b"]) is sides.ns["B"]
        sides.local("b2 = B(); B.tag = [a]")
        sides.remote("b2.x = 1; B.tag.append(b); ok = B.tag[0] is a and type(b2) is B")
        assert sides.ns["ok"] and sides.ns["B"].tag == [a, sides.ns["b"]]
        assert sides.ns["A"] is cls and sides.ns["a"] is a and cls.made == 4


def test_tracebacks_of_notebook_functions_show_their_source(tmp_path: Path) -> None:
    with worker_process() as process:
        sides = Sides(tmp_path, ProcessWorker(process, tmp_path / "worker"))
        sides.local("def f(x):\n    y = x\n    return 1 / y  # here\n")
        sides.remote(
            "import traceback\n"
            "try:\n    f(0)\nexcept ZeroDivisionError:\n    text = traceback.format_exc()\n"
        )
        assert "return 1 / y  # here" in sides.ns["text"] and "line 3, in f" in sides.ns["text"]


def test_an_object_replaced_by_an_equal_one_is_a_change(sides: Sides) -> None:
    sides.local("inner = [1]; x = [inner, [1]]; frame = {'self': x}")
    x, inner = sides.ns["x"], sides.ns["inner"]
    assert sides.remote("x[1] = inner").changed == ["x"]
    assert sides.ns["x"] is x and x[1] is inner is x[0]
    sides.remote("x[0] = [1]")
    assert x[1] is inner and x[0] is not inner and x[0] == inner


def test_states_that_are_made_for_pickling_are_no_change(sides: Sides) -> None:
    sides.local(
        "class Stateful:\n"
        "    def __init__(self): self.items = [1]\n"
        "    def __getstate__(self): return {'copy': list(self.items)}\n"
        "    def __setstate__(self, state): self.items = state['copy']\n"
        "s = Stateful()"
    )
    for _ in range(2):
        assert sides.remote("len(s.items)").changed == []
    assert sides.remote("s.items.append(2)").changed == ["s"]


def test_a_variable_that_shared_objects_is_deleted_over_there_too(sides: Sides) -> None:
    sides.local("b = [1]")
    sides.remote("a = b")
    sides.remote("a.append(2)")
    sides.local("del b")
    assert type(sides.remote("b").error) is NameError
