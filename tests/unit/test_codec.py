from __future__ import annotations

import collections
import gc
import inspect
import linecache
import os
import pickle
import sys
import threading
import traceback
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlinfra_sdk.errors import NotTransferable
from mlinfra_sdk.objects.blob import Packed
from mlinfra_sdk.objects.codec import Dump, decode, encode
from mlinfra_sdk.objects.modules import LazyModule
from mlinfra_sdk.objects.realm import Realm, Stub
from mlinfra_sdk.objects.store import CHUNK_SIZE, ChunkStore


class Ends:
    """Two realms in one process."""

    def __init__(self, store: ChunkStore) -> None:
        self.store = store
        self.here = Realm({"__name__": "__main__"})
        self.there = Realm({"__name__": "__main__"})

    def define(self, code: str) -> dict[str, Any]:
        exec(code, self.here.ns)
        return self.here.ns

    def send(self, *values: Any, **options: Any) -> tuple[list[Any], Dump]:
        dump = encode(list(values), self.here, **options)
        return self._load(dump, self.there), dump

    def back(self, *values: Any, **options: Any) -> list[Any]:
        return self._load(encode(list(values), self.there, **options), self.here)

    def _load(self, dump: Dump, realm: Realm) -> list[Any]:
        packed = msgspec.msgpack.encode(dump.pack(self.store))
        values, objects = decode(msgspec.msgpack.decode(packed, type=Packed), self.store, realm)
        sent = dump.objects()
        for index in objects.keys() & sent.keys():
            assert type(objects[index]) is type(sent[index]) or not isinstance(
                sent[index], (list, dict, set)
            ), "both sides agree which object has which index"
        return values


@pytest.fixture
def ends(tmp_path: Path) -> Ends:
    return Ends(ChunkStore(tmp_path))


# Functions


def test_a_notebook_function_uses_the_receiving_namespace(ends: Ends) -> None:
    ns = ends.define(
        "k = 1\ndef f(x, y=2, *, z=3):\n    global seen\n    seen = k\n    return g(x) + k"
    )
    (f,), dump = ends.send(ns["f"], inline=("f",))
    assert dump.names == {"k", "g", "seen"}
    ends.there.ns.update(k=10, g=lambda x: 100 * x)
    assert f(2) == 210 and ends.there.ns["seen"] == 10
    assert f.__globals__ is ends.there.ns
    assert inspect.signature(f) == inspect.signature(ns["f"])


def test_names_of_nested_functions_and_classes_are_found(ends: Ends) -> None:
    ns = ends.define(
        "def f():\n"
        "    def inner(): return [a for _ in b]\n"
        "    class Local:\n"
        "        attribute = c\n"
        "        def method(self): return lambda: d\n"
        "    del e\n"
        "    return inner, Local\n"
    )
    _, dump = ends.send(ns["f"], inline=("f",))
    assert {"a", "b", "c", "d", "e"} <= dump.names | {"e"}


def test_methods_of_instances_bring_their_names(ends: Ends) -> None:
    ns = ends.define("class C:\n    def m(self): return helper()\ndeep = [{'k': (C(),)}]")
    _, dump = ends.send(ns["deep"], inline=("C",))
    assert "helper" in dump.names
    dump = encode([ns["deep"]], ends.here)
    assert dump.definitions == {"C"} and "helper" not in dump.names


def test_closures_share_their_cells(ends: Ends) -> None:
    ns = ends.define(
        "def counter():\n"
        "    n = 0\n"
        "    def up():\n"
        "        nonlocal n; n += 1; return n\n"
        "    def get(): return n\n"
        "    return up, get\n"
        "up, get = counter()\nup()"
    )
    (up, get), _ = ends.send(ns["up"], ns["get"], inline=("up", "get"))
    up()
    assert get() == 2 and ns["get"]() == 1


def test_recursive_closures_and_empty_cells(ends: Ends) -> None:
    ns = ends.define(
        "def make():\n"
        "    def fact(n): return 1 if n < 2 else n * fact(n - 1)\n"
        "    return fact\n"
        "def lazy():\n"
        "    def get(): return late\n"
        "    if False: late = 1\n"
        "    return get\n"
        "fact = make(); get = lazy()"
    )
    (fact, get), _ = ends.send(ns["fact"], ns["get"], inline=("fact", "get"))
    assert fact(5) == 120
    with pytest.raises(NameError):
        get()


def test_function_attributes_and_defaults(ends: Ends) -> None:
    ns = ends.define("def f(x=[]):\n    'text'\n    return x\nf.calls = f.__defaults__[0]")
    (f,), _ = ends.send(ns["f"], inline=("f",))
    assert f.__doc__ == "text" and f.calls is f.__defaults__[0]


def test_functions_of_modules_keep_their_modules_globals(ends: Ends) -> None:
    wrapped = linecache.lazycache  # by reference
    ns = ends.define("import contextlib\n@contextlib.contextmanager\ndef cm(): yield 5")
    (same, cm), _ = ends.send(wrapped, ns["cm"], inline=("cm",))
    assert same is wrapped
    with cm() as value:
        assert value == 5
    assert cm.__globals__ is vars(sys.modules["contextlib"])


def test_functions_of_no_module_share_their_own_globals(ends: Ends) -> None:
    scope: dict[str, Any] = {"k": 1, "unused": 2}
    exec("def f():\n    global k\n    k += 1\ndef g(): return k", scope)
    (f, g), _ = ends.send(scope["f"], scope["g"])
    f()
    assert g() == 2 and scope["k"] == 1
    assert f.__globals__ is g.__globals__ and "unused" not in f.__globals__


def test_named_definitions_travel_as_names(ends: Ends) -> None:
    ns = ends.define("def f(): return 1\nclass C: pass\nitems = [f, C(), C]")
    ends.there.ns.update(f="the f over there", C=ns["C"])
    (items,), dump = ends.send(ns["items"])
    assert items[0] == "the f over there" and dump.definitions == {"f", "C"}


def test_cached_functions_arrive_with_an_empty_cache(ends: Ends) -> None:
    ns = ends.define(
        "import functools\n@functools.lru_cache(maxsize=7)\ndef f(x): return x * k\nk = 2\nf(1)"
    )
    (f,), dump = ends.send(ns["f"], inline=("f",))
    ends.there.ns["k"] = 3
    assert f(1) == 3 and f.cache_info().maxsize == 7 and dump.names == {"k"}


def test_sources_of_cells_travel(ends: Ends) -> None:
    code = "def f():\n    raise ValueError\n"
    name = "<cell 42 of the test>"
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    exec(compile(code, name, "exec"), ends.here.ns)
    dump = encode([ends.here.ns["f"]], ends.here, inline=("f",))
    packed = dump.pack(ends.store)
    del linecache.cache[name]
    (f,), _ = decode(packed, ends.store, ends.there)
    linecache.checkcache()
    assert inspect.getsource(f) == code


# Classes


def test_class_identity_is_stable_over_round_trips(ends: Ends) -> None:
    ns = ends.define("class C:\n    def m(self): return 1")
    (cls, obj), _ = ends.send(ns["C"], ns["C"](), inline=("C",))
    back, cls_back = ends.back(obj, cls, inline=("C",))
    assert type(back) is ns["C"] and cls_back is ns["C"] and back.m() == 1


def test_class_attributes_arrive_and_vanish(ends: Ends) -> None:
    ns = ends.define("class C:\n    x = 1\n    y = 2")
    encoded = encode([ns["C"]], ends.here, inline=("C",)).pack(ends.store)
    ns["C"].z = 3
    del ns["C"].x
    decode(encoded, ends.store, ends.here)
    assert ns["C"].x == 1 and ns["C"].y == 2 and not hasattr(ns["C"], "z")


CLASSES = """
import abc, dataclasses, enum, typing
class Meta(type):
    def __new__(mcs, name, bases, ns): return super().__new__(mcs, name, bases, ns)
    def hello(cls): return cls.__name__
class WithMeta(metaclass=Meta): pass
class Slots:
    __slots__ = ("a", "__b")
    def __init__(self): self.a = 1; self.__b = 2
    def b(self): return self.__b
class Base(abc.ABC):
    @abc.abstractmethod
    def run(self): ...
class Impl(Base):
    def run(self): return super().__repr__() and 5
@dataclasses.dataclass(order=True)
class Point:
    x: int
    y: list = dataclasses.field(default_factory=list)
@dataclasses.dataclass(frozen=True)
class Frozen:
    x: int
class Color(enum.Enum):
    RED = 1
    BLUE = 2
    def shout(self): return self.name + "!"
class Flags(enum.IntFlag):
    A = 1
    B = 2
class Pair(typing.NamedTuple):
    a: int
    b: str = "b"
class Props:
    def __init__(self): self._v = 1
    @property
    def v(self): return self._v
    @v.setter
    def v(self, value): self._v = value
    @staticmethod
    def s(): return "s"
    @classmethod
    def c(cls): return cls
T = typing.TypeVar("T")
class Box(typing.Generic[T]):
    def __init__(self, item: T): self.item = item
class MyList(list):
    tag = "t"
class Raises(Exception):
    def __init__(self, a, b): super().__init__(f"{a}-{b}"); self.a = a
"""
CHECKS = [
    ("WithMeta", "WithMeta.hello()"),
    ("Slots", "(Slots().a, Slots().b(), hasattr(Slots(), '__dict__'))"),
    ("Impl", "Impl().run()"),
    ("Base", "type(Base).__name__"),
    ("Point", "(Point(1) < Point(2), Point(3, [4]))"),
    ("Frozen", "(hash(Frozen(1)) == hash(Frozen(1)), Frozen(1) == Frozen(1))"),
    ("Color", "(Color.RED.shout(), Color(2) is Color.BLUE, list(Color))"),
    ("Flags", "(Flags.A | Flags.B, int(Flags.B))"),
    ("Pair", "(Pair(1), Pair(1)._replace(a=2), Pair._fields)"),
    ("Props", "(Props().v, Props.s(), Props.c() is Props)"),
    ("Box", "(Box(1).item, Box[int].__args__)"),
    ("MyList", "(MyList([1]), MyList.tag)"),
    ("Raises", "(Raises(1, 2).args, Raises(1, 2).a)"),
]


@pytest.mark.parametrize(("name", "check"), CHECKS)
def test_kinds_of_classes_work_in_another_process(name: str, check: str, tmp_path: Path) -> None:
    """The expression has the same value here, over there, and here again after the return."""
    from sides import ProcessWorker, Sides, worker_process

    with worker_process() as process:
        sides = Sides(tmp_path, ProcessWorker(process, tmp_path / "worker"))
        sides.local(CLASSES)
        expected = repr(sides.local(check))
        cls = sides.ns[name]
        report = sides.remote(f"value = repr({check}); {name}.added = 5; cls = {name}")
        assert report.error is None
        assert sides.ns["value"] == expected
        assert sides.ns["cls"] is cls is sides.ns[name]
        assert cls.added == 5
        assert repr(sides.local(check)) == expected


HOOKS = """
made = []
class Registry(type):
    def __new__(mcs, name, bases, ns, **options):
        made.append(name)
        return super().__new__(mcs, name, bases, ns)
    def __init__(cls, name, bases, ns, *, needed):
        super().__init__(name, bases, ns)
        cls.needed = needed
class Plugin(metaclass=Registry, needed=1): pass
class Base:
    def __init_subclass__(cls, *, key):
        made.append(key)
        cls.key = key
class Derived(Base, key="k"): pass
"""


def test_hooks_of_a_classs_definition_do_not_run_again(tmp_path: Path) -> None:
    from sides import ProcessWorker, Sides, worker_process

    with worker_process() as process:
        sides = Sides(tmp_path, ProcessWorker(process, tmp_path / "worker"))
        sides.local(HOOKS)
        report = sides.remote("found = made, type(Plugin) is Registry, Plugin.needed, Derived.key")
        assert report.error is None
        assert sides.ns["found"] == (["Plugin", "k"], True, 1, "k")
        sides.remote("class Second(Base, key='s'): pass\nclass Other(Plugin, needed=2): pass")
        assert sides.ns["made"] == ["Plugin", "k", "s", "Other"]
        assert sides.ns["Other"].needed == 2 and issubclass(sides.ns["Second"], sides.ns["Base"])


def test_enum_members_stay_themselves(ends: Ends) -> None:
    ns = ends.define("import enum\nclass Color(enum.Enum):\n    RED = 1")
    (cls, member), _ = ends.send(ns["Color"], ns["Color"].RED, inline=("Color",))
    assert member is cls.RED
    (back,) = ends.back(member, inline=("Color",))
    assert back is ns["Color"].RED


# Modules


def test_modules_travel_by_name(ends: Ends) -> None:
    (module, submodule), _ = ends.send(os, os.path)
    assert module is os and submodule is os.path


def test_a_module_is_imported_when_it_is_used(ends: Ends, monkeypatch: Any) -> None:
    import sndhdr_like_module as module  # type: ignore[import-not-found]

    encoded = encode([module], ends.here).pack(ends.store)
    monkeypatch.delitem(sys.modules, "sndhdr_like_module")
    (lazy,), _ = decode(encoded, ends.store, ends.there)
    assert type(lazy) is LazyModule and "sndhdr_like_module" not in sys.modules
    again = encode([lazy], ends.there)
    assert "sndhdr_like_module" not in sys.modules and again.dropped == {}
    assert lazy.answer == 42 and "sndhdr_like_module" in sys.modules
    lazy.answer = 43
    assert sys.modules["sndhdr_like_module"].answer == 43
    assert "answer" in dir(lazy) and isinstance(lazy, type(sys))


@pytest.fixture(autouse=True)
def a_module(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "sndhdr_like_module.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(folder)


def test_a_module_that_nobody_can_import_travels_by_content(ends: Ends) -> None:
    import types

    module = types.ModuleType("made_by_hand")
    module.items = [1, 2]  # type: ignore[attr-defined]
    (copy,), _ = ends.send(module)
    assert copy.__name__ == "made_by_hand" and copy.items == [1, 2]


# Arrays and tensors


def test_large_buffers_stay_out_of_the_stream(ends: Ends) -> None:
    array = np.random.default_rng(0).random(CHUNK_SIZE // 4)
    (copy,), dump = ends.send(array)
    assert len(dump.stream) < 1000 and len(dump.buffers) == 1 and dump.size > array.nbytes
    assert np.array_equal(copy, array) and copy.flags.writeable
    copy[0] = -1
    assert array[0] != -1


@pytest.mark.parametrize(
    "view",
    ["a[1:3]", "a[::-1]", "a[:, 1]", "a.T", "a[::2, ::-3]", "a.reshape(-1)[5:50:7]", "a[0, 0:0]",
     "a.astype('>i2')", "a.astype('M8[s]')", "a.astype('U5')", "a.astype(object)", "a[0, 0, None]",
     "np.asfortranarray(a)", "a.view('i4')", "np.broadcast_to(a[0], (3, 12))",
     "np.rec.fromarrays([a[0], a[1]], names='x,y')", "np.ma.masked_greater(a, 40)",
     "np.float32(3)", "np.lib.stride_tricks.as_strided(a, (4, 4), (8, 8))"],
)  # fmt: skip
def test_arrays_of_all_layouts(ends: Ends, view: str) -> None:
    array = eval(view, {"np": np, "a": np.arange(120).reshape(10, 12)})
    (copy,), _ = ends.send(array)
    assert type(copy) is type(array) and copy.dtype == array.dtype and copy.shape == array.shape
    assert copy.tolist() == array.tolist()


def test_read_only_arrays_stay_read_only(ends: Ends) -> None:
    small, large = np.arange(5), np.arange(100_000)
    small.flags.writeable = large.flags.writeable = False
    copies, _ = ends.send(small, large)
    assert [copy.flags.writeable for copy in copies] == [False, False]


def test_views_of_one_array_stay_views(ends: Ends) -> None:
    base = np.arange(400_000.0).reshape(400, 1000)
    views = [base, base[::2, 5:], base.T, base[-1], base.view(np.uint64)]
    copies, dump = ends.send(*views)
    assert [copy.tolist() for copy in copies] == [view.tolist() for view in views]
    assert sum(buffer.raw().nbytes for buffer in dump.buffers) == base.nbytes
    for array in (base, copies[0]):
        array[0, 5] = -1
    assert [copy.tolist() for copy in copies] == [view.tolist() for view in views]


@pytest.mark.parametrize("size", [12, 120_000])
@pytest.mark.parametrize("order", ["C", "F"])
def test_views_have_the_array_as_their_base(ends: Ends, size: int, order: Any) -> None:
    base = np.asarray(np.arange(size).reshape(3, -1), order=order).copy("K")
    (row, copy), _ = ends.send(base[1], base)
    assert row.base is copy and copy[1:].base is copy and copy.flags.forc
    assert copy.tolist() == base.tolist()
    copy[1, 1] = -1
    assert row[1] == -1
    (alone,), _ = ends.send(base)
    assert alone[1].base is alone


def test_a_small_array_owns_its_memory(ends: Ends) -> None:
    (copy,), _ = ends.send(np.arange(3))
    copy.resize(5, refcheck=False)
    assert copy.tolist() == [0, 1, 2, 0, 0]


def test_a_view_alone_does_not_bring_its_base(ends: Ends) -> None:
    base = np.zeros((1000, 1000))
    (rows, column), dump = ends.send(base[:20], base[500:, 3])
    assert dump.size < 300_000
    assert rows.shape == (20, 1000) and column.shape == (500,)


def test_overlapping_windows_only_bring_what_they_cover(ends: Ends) -> None:
    base = np.arange(1_000_000)
    (a, b), dump = ends.send(base[100:30_000], base[20_000:50_000])
    assert dump.size < 500_000
    a[-1] = -5
    assert b[9_999] == -5


def test_a_mapped_array_is_recognised_when_it_returns(ends: Ends) -> None:
    array = np.random.default_rng(0).random(CHUNK_SIZE)
    (copy,), dump = ends.send(array)
    again = encode([copy], ends.there)
    assert ends.store.unchanged_bytes(again.buffers[0]) == array.nbytes
    refs = [ends.store.digest_buffer(buffer) for buffer in dump.buffers]
    assert [ends.store.digest_buffer(buffer) for buffer in again.buffers] == refs


torch = pytest.importorskip("torch")


def test_tensors_keep_layout_and_gradients(ends: Ends) -> None:
    tensor = torch.arange(60.0).reshape(5, 12)
    weight = torch.nn.Parameter(torch.ones(3))
    (weight * 2).sum().backward()
    weight.tag = "t"
    empty = torch.empty(0, 3, dtype=torch.int8)
    values = [tensor[1:, ::2], tensor.t(), weight, empty, tensor.to(torch.bfloat16), weight * 2]
    copies, _ = ends.send(*values)
    for copy, value in zip(copies, values, strict=True):
        assert torch.equal(copy, value) and copy.dtype == value.dtype
        assert type(copy) is type(value) and copy.requires_grad == value.requires_grad
    assert torch.equal(copies[2].grad, weight.grad) and copies[2].tag == "t"


def test_tied_weights_and_views_stay_shared(ends: Ends) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    row = model[0].weight.data[1]
    (copy, row_copy), _ = ends.send(model, row)
    assert copy[0].weight is copy[1].weight
    row_copy.fill_(7)
    assert copy[1].weight[1].tolist() == [7.0] * 4


def test_optimizers_keep_their_parameters(ends: Ends) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    (model2, optimizer2), _ = ends.send(model, optimizer)
    before = model2.weight.clone()
    optimizer2.step()
    assert optimizer2.param_groups[0]["params"][0] is model2.weight
    assert not torch.equal(before, model2.weight)


def test_optimizers_keep_what_schedulers_and_hooks_added(ends: Ends) -> None:
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    steps: list[int] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    (copy, schedule, weight, done), _ = ends.send(optimizer, scheduler, layer.weight, steps)
    assert schedule.optimizer is copy and copy.param_groups[0]["params"][0] is weight
    weight.grad = torch.ones_like(weight)
    before = weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.step()
        schedule.step()
    assert torch.allclose(before - weight, torch.ones(1, 2)) and done == [1] and steps == []
    (back, back_weight) = ends.back(copy, weight)
    assert back._opt_called and back.step.__closure__ is not None
    back.step()
    assert torch.allclose(weight - back_weight, torch.full((1, 2), 0.5))


def test_a_view_of_a_large_tensor_only_brings_its_part(ends: Ends) -> None:
    tensor = torch.zeros(1_000_000)
    _, dump = ends.send(tensor[10:20])
    assert dump.size < 2000


def test_a_device_that_is_not_here_is_remembered(ends: Ends) -> None:
    from mlinfra_sdk.objects.realm import receiving
    from mlinfra_sdk.objects.reducers_torch import make_storage, make_tensor

    with receiving(ends.there):
        storage = make_storage(bytearray(16), "cuda:99")
        tensor = make_tensor(storage, torch.float32, 0, (4,), (1,), False, "cuda:99", False)
    assert tensor.device.type == "cpu"
    assert ends.there.home_devices.get(tensor) == "cuda:99"
    stream = encode([tensor], ends.there).stream
    assert b"cuda:99" in stream
    del tensor
    gc.collect()
    assert not ends.there.home_devices._entries


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_tensors_travel(ends: Ends) -> None:
    tensor = torch.arange(10.0, device="cuda")
    (copy, view), _ = ends.send(tensor, tensor[2:4])
    assert copy.device == tensor.device and copy.tolist() == tensor.tolist()
    copy[2] = -1
    assert view[0] == -1


# What stays at home


def test_a_stub_resolves_to_the_original(ends: Ends) -> None:
    generator = (i for i in range(3))
    (stub, holder), dump = ends.send(generator, [generator], where="'g'")
    assert type(stub) is Stub and holder[0] is stub
    assert dump.dropped == {id(generator): "a generator (in 'g')"}
    assert ends.back([stub])[0][0] is generator


@pytest.mark.parametrize(
    "use",
    [next, iter, len, bool, str, list, lambda s: s.close, lambda s: s + 1, lambda s: 1 + s,
     lambda s: s[0], lambda s: s(), lambda s: s == 1, lambda s: setattr(s, "a", 1), np.asarray,
     lambda s: s.__enter__()],
)  # fmt: skip
def test_any_use_of_a_stub_says_what_it_is(ends: Ends, use: Any) -> None:
    (stub,), _ = ends.send((i for i in range(3)), where="'g'")
    with pytest.raises((NotTransferable, AttributeError)) as caught:
        use(stub)
    if caught.type is NotTransferable:
        assert "generator (in 'g')" in str(caught.value)
    assert "generator" in repr(stub)


def test_a_stub_of_something_that_died_stays_a_stub(ends: Ends) -> None:
    generator = (i for i in range(3))
    (stub,), dump = ends.send(generator)
    del generator, dump
    gc.collect()
    assert type(ends.back(stub)[0]) is Stub


def test_locks_arrive_fresh_and_return_as_themselves(ends: Ends) -> None:
    lock, rlock, event = threading.Lock(), threading.RLock(), threading.Event()
    lock.acquire()
    event.set()
    (lock2, rlock2, event2), dump = ends.send(lock, rlock, event)
    assert not lock2.locked() and type(rlock2) is type(rlock) and event2.is_set()
    assert dump.dropped == {}
    assert ends.back(lock2, rlock2) == [lock, rlock]


def test_objects_whose_reduce_raises_are_stubs(ends: Ends) -> None:
    ns = ends.define(
        "class Bad:\n    def __reduce_ex__(self, p): raise RuntimeError('no')\nb = Bad()"
    )
    ((one, stub),), dump = ends.send([1, ns["b"]])
    assert one == 1 and type(stub) is Stub and list(dump.dropped.values()) == ["a __main__.Bad"]


def test_what_pickle_itself_rejects_is_one_clear_error(ends: Ends) -> None:
    ns = ends.define("class Odd:\n    def __reduce__(self): return 1, 2\no = Odd()")
    with pytest.raises(NotTransferable, match="'o' cannot be pickled"):
        encode([ns["o"]], ends.here, where="'o'")


def test_deep_graphs_travel(ends: Ends) -> None:
    deep: list[Any] = []
    for _ in range(20_000):
        deep = [deep]
    if sys.version_info < (3, 12):  # later ones limit the C stack
        (copy,), _ = ends.send(deep)
        depth = 0
        while copy:
            copy, depth = copy[0], depth + 1
        assert depth == 20_000
    for _ in range(2_000_000):
        deep = [deep]
    with pytest.raises(NotTransferable, match="recursion"):
        encode([deep], ends.here)
    while deep:
        deep = deep.pop()


def test_weak_references(ends: Ends) -> None:
    target = threading.Event()
    dead = weakref.ref(threading.Event())
    mapping: Any = weakref.WeakValueDictionary(k=target)
    (ref, target2, dead2, mapping2), _ = ends.send(weakref.ref(target), target, dead, mapping)
    assert ref() is target2 and dead2() is None and mapping2["k"] is target2


# Exceptions


def test_exceptions_keep_type_arguments_cause_and_notes(ends: Ends) -> None:
    ns = ends.define(CLASSES)
    try:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise ns["Raises"](1, 2) from inner
    except Exception as raised:
        error = raised
    vars(error)["__notes__"] = ["note"]
    (copy,), _ = ends.send(error, inline=("Raises",))
    assert type(copy) is ns["Raises"] and copy.args == ("1-2",) and copy.a == 1
    assert repr(copy.__cause__) == "KeyError('inner')" and copy.__suppress_context__
    assert copy.__notes__ == ["note"]
    shown = traceback.format_exception(type(error), error, error.__traceback__)
    assert traceback.format_exception(type(copy), copy, copy.__traceback__) == shown


@pytest.mark.parametrize(
    "error",
    [OSError(2, "No such file", "name"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
     StopIteration(5), SystemExit(3), NotTransferable("text", hint="do this"),
     SyntaxError("bad", ("file", 1, 2, "text")), ImportError("no", name="m", path="p")],
)  # fmt: skip
def test_builtin_exceptions(ends: Ends, error: BaseException) -> None:
    (copy,), _ = ends.send(error)
    assert type(copy) is type(error) and copy.args == error.args and str(copy) == str(error)
    for name in ("filename", "hint", "name", "lineno", "value"):
        assert getattr(copy, name, None) == getattr(error, name, None)


# Digests


def test_digests_tell_contents_apart(ends: Ends) -> None:
    def digest(value: Any) -> bytes:
        dump = encode([value], ends.here)
        return dump.digest([ends.store.digest_buffer(buffer) for buffer in dump.buffers])

    array = np.arange(100_000)
    value = [1, {"k": array}, {1, 2}]
    first = digest(value)
    assert digest(value) == first
    array[50_000] += 1
    assert digest(value) != first
    array[50_000] -= 1
    assert digest(value) == first
    value[2].add(3)  # type: ignore[attr-defined]
    assert digest(value) != first


def test_sharing_is_what_can_be_observed(ends: Ends) -> None:
    shared: list[int] = [1]
    dtype = np.dtype("float64")
    ns = ends.define("class C: pass\ndef f(): pass")
    things = [3, "text", (1, 2), dtype, np.mean, list, ns["C"], ns["f"], sys, Path("a")]
    first, second = encode([shared, *things], ends.here), encode([[shared], *things], ends.here)
    assert first.shareable() & second.shareable() == {id(shared)}
    array = np.zeros(10)
    left, right = encode([array[:3]], ends.here), encode([array[5:]], ends.here)
    assert left.shareable() & right.shareable() == {id(array)}


# Random graphs


def graphs() -> st.SearchStrategy[list[Any]]:
    """A list of objects that refer to one another at random, cycles included."""
    kinds = st.sampled_from(["list", "dict", "set", "tuple", "object", "array", "deque", "str"])
    links = st.lists(st.integers(0, 30), max_size=4)
    return st.lists(st.tuples(kinds, links), min_size=1, max_size=12).map(_build)


def _build(plan: list[tuple[str, list[int]]]) -> list[Any]:
    make: dict[str, Any] = {
        "list": list,
        "dict": dict,
        "set": set,
        "tuple": tuple,
        "object": SimpleNamespace,
        "array": lambda: np.arange(3),
        "deque": collections.deque,
        "str": lambda: "text",
    }
    objects = [make[kind]() for kind, _ in plan]
    for (kind, links), obj in zip(plan, objects, strict=True):
        targets = [objects[link % len(objects)] for link in links]
        if kind == "list" or kind == "deque":
            obj.extend([*targets, (1, targets)])
        elif kind == "dict":
            obj.update(enumerate(targets))
        elif kind == "set":
            obj.update(t for t in targets if isinstance(t, (str, tuple)))
        elif kind == "object":
            obj.items = targets
    return objects


def shape_of(root: Any) -> str:
    """Text that shows content and which objects are the same."""
    numbers: dict[int, int] = {}

    def show(value: Any) -> str:
        if isinstance(value, (int, str)):
            return repr(value)
        if id(value) in numbers:
            return f"#{numbers[id(value)]}"
        numbers[id(value)] = len(numbers)
        name = type(value).__name__
        if isinstance(value, dict):
            return f"{name}({', '.join(f'{k}: {show(v)}' for k, v in value.items())})"
        if isinstance(value, SimpleNamespace):
            return f"{name}({show(value.items)})"
        if isinstance(value, set):
            return f"{name}({sorted(map(show, value))})"
        return f"{name}({', '.join(map(show, value.tolist() if name == 'ndarray' else value))})"

    return show(root)


@settings(max_examples=200, deadline=None)
@given(objects=graphs())
def test_random_graphs_keep_their_shape(
    objects: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    ends = Ends(ChunkStore(tmp_path_factory.mktemp("store")))
    (copy,), _ = ends.send(objects)
    assert shape_of(copy) == shape_of(objects)
    (again,) = ends.back(copy)
    assert shape_of(again) == shape_of(objects)


def test_the_stream_is_ordinary_pickle(ends: Ends) -> None:
    dump = encode([[1, "a", {2.5: None}]], ends.here)
    assert pickle.loads(dump.stream) == [[1, "a", {2.5: None}]]
