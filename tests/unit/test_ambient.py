"""State goes from one process to others: one has the libraries loaded, one imports them later."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from mlinfra_sdk.namespace.ambient import AMBIENT, read_all, write_all

LIBRARIES = """
import decimal, numpy, numpy.random, pandas, matplotlib, sklearn, torch
import matplotlib_inline.config
"""

SETUP = """
import random, os, sys, warnings, logging
os.environ["AMBIENT_NEW"] = "1"
os.environ["AMBIENT_OLD"] = "changed"
del os.environ["AMBIENT_GONE"]
sys.path.insert(0, "/first")
sys.path.append("/last")
os.chdir(other)
random.seed(1); random.gauss(0, 1)
sys.setrecursionlimit(4321)
warnings.filterwarnings("ignore", "some.*text", UserWarning, module="mod")
warnings.simplefilter("error", ResourceWarning)
decimal.getcontext().prec = 7
decimal.getcontext().traps[decimal.Inexact] = True
logging.basicConfig(level=logging.INFO, format="{levelname}|{message}", style="{",
                    stream=sys.stdout)
logging.getLogger("app").setLevel(logging.DEBUG)
logging.getLogger("app").addHandler(logging.FileHandler("app.log", encoding="utf-8"))
logging.getLogger("matplotlib").setLevel(logging.ERROR)
shell.ast_node_interactivity = "all"
shell.display_formatter.formatters["text/plain"].float_precision = "%.3f"
shell.InteractiveTB.set_mode(mode="Minimal")
numpy.random.seed(5); numpy.random.standard_normal()
numpy.set_printoptions(precision=2, suppress=True,
                       formatter={"bool": lambda value: "yes" if value else "no"})
numpy.seterr(divide="raise")
pandas.set_option("display.max_rows", 7)
pandas.options.display.float_format = lambda value: f"<{value:.1f}>"
matplotlib.rcParams["lines.linewidth"] = 5
matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=["r", "g"])
config = matplotlib_inline.config.InlineBackend.instance(parent=shell)
config.shell = shell
config.figure_formats = {"svg"}
sklearn.set_config(transform_output="pandas")
torch.manual_seed(3); torch.rand(2)
torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
torch.set_printoptions(precision=2)
"""

CHECKS = {
    "environ": '[os.environ.get("AMBIENT_" + x) for x in ("NEW", "OLD", "GONE", "KEPT")]',
    "sys.path": '[sys.path[0], sys.path[-1], sys.path.count("/first")]',
    "cwd": "os.getcwd()",
    "random": "random.random(), random.gauss(0, 1)",
    "recursion": "sys.getrecursionlimit()",
    "warnings": "[f[0] for f in warnings.filters if f[2] in (ResourceWarning, UserWarning)]",
    "decimal": "decimal.getcontext().prec, decimal.getcontext().traps[decimal.Inexact]",
    "log handlers": '[str(logging.getLogger(name).handlers) for name in ("", "app")]',
    "log levels": '[logging.getLogger(n).level for n in ("", "app", "matplotlib")]',
    "log lines": 'said(\'logging.getLogger("app").debug("text")\')',
    "interactivity": "said('_ = shell.run_cell(\"1; 2.0\")')",
    "xmode": "shell.InteractiveTB.mode",
    "numpy random": "numpy.random.standard_normal(2).tolist()",
    "numpy print": "str(numpy.array([1.23456])), str(numpy.array([True]))",
    "numpy errors": "numpy.geterr()['divide']",
    "pandas": 'pandas.get_option("display.max_rows"), str(pandas.Series([1.25]))',
    "matplotlib": 'matplotlib.rcParams["lines.linewidth"], matplotlib.rcParams["axes.prop_cycle"]',
    "inline": "sorted(matplotlib_inline.config.InlineBackend.instance().figure_formats)",
    "inline renders": 'len(shell.display_formatter.formatters["image/svg+xml"].type_printers)',
    "sklearn": 'sklearn.get_config()["transform_output"]',
    "torch random": "torch.rand(2).tolist()",
    "torch": "torch.get_default_dtype(), torch.is_grad_enabled(), str(torch.tensor([1.23456]))",
}

PROCESS = """
import io, os, sys, contextlib, pickle, random, warnings, logging
os.environ.update(AMBIENT_OLD="old", AMBIENT_GONE="old", AMBIENT_KEPT="kept")
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
from mlinfra_sdk.namespace import ambient
other, work, role = sys.argv[1:]
def said(code):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        for handler in logging.root.handlers:
            handler.setStream(sys.stdout)
        exec(code)
    return text.getvalue()
"""

REPORT = f"""
results = {{}}
for name, check in {CHECKS!r}.items():
    try:
        results[name] = repr(eval(check))
    except Exception as error:
        results[name] = repr(error)
again = ambient.read_all(True)
with open(work + "/" + role, "wb") as file:
    pickle.dump((values, results, failures), file)
"""


def run_process(work: Path, role: str, code: str) -> tuple[dict[str, bytes], dict[str, str], Any]:
    other = work / "other"
    other.mkdir(exist_ok=True)
    program = "\n".join(textwrap.dedent(part) for part in (PROCESS, code, REPORT))
    command = [sys.executable, "-c", program, str(other), str(work), role]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work)
    assert done.returncode == 0, done.stderr
    loaded: tuple[dict[str, bytes], dict[str, str], Any] = pickle.loads((work / role).read_bytes())
    return loaded


WRITE = """
values = pickle.load(open(work + "/origin", "rb"))[0]
failures = ambient.write_all(values)
waiting = {name for name in values if ambient.AMBIENT[name].read() == values[name]}
failures += sorted(set(values) - waiting) if role == "later" else []
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ambient")


@pytest.fixture(scope="module")
def origin(work: Path) -> tuple[dict[str, bytes], dict[str, str], Any]:
    code = LIBRARIES + SETUP + "failures = []\nvalues = ambient.read_all(True)\n"
    return run_process(work, "origin", code)


@pytest.fixture(scope="module")
def loaded(work: Path, origin: Any) -> dict[str, str]:
    _, results, failures = run_process(work, "loaded", LIBRARIES + WRITE)
    assert failures == []
    return results


@pytest.fixture(scope="module")
def later(work: Path, origin: Any) -> dict[str, str]:
    _, results, failures = run_process(work, "later", WRITE + LIBRARIES)
    assert failures == [], "a value that waits for its module is what is read"
    return results


@pytest.mark.parametrize("check", CHECKS)
def test_state_arrives(
    check: str, origin: Any, loaded: dict[str, str], later: dict[str, str]
) -> None:
    expected = origin[1][check]
    assert "Error" not in expected
    assert loaded[check] == expected
    assert later[check] == expected


def test_every_adapter_was_read(origin: Any) -> None:
    no_workspace = {"workspace.cwd", "workspace.sys.path"}
    assert set(origin[0]) == set(AMBIENT) - no_workspace


def run_here(code: str, *, cwd: Path | None = None) -> str:
    program = "from mlinfra_sdk.namespace import ambient\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_imported_and_nothing_left_behind() -> None:
    said = run_here(
        """
        import sys
        finders = list(sys.meta_path)
        values = ambient.read_all(True)
        print([name for name in ("numpy", "pandas", "torch", "matplotlib") if name in sys.modules])
        print(sorted(values))
        assert ambient.write_all(values) == [] and ambient.read_all(True) == values
        assert sys.meta_path == finders
        """
    )
    assert said.splitlines()[0] == "[]"
    assert "numpy" not in said.splitlines()[1]


def test_the_import_hook_leaves_the_module_as_it_is() -> None:
    said = run_here(
        """
        import importlib.util, inspect, pickle, sys
        ambient.write_all({"sklearn": pickle.dumps({"assume_finite": True, "unknown": 1}),
                           "pandas": pickle.dumps({"no.such": 1})})
        assert importlib.util.find_spec("sklearn").name == "sklearn"
        import sklearn
        print(sklearn.get_config()["assume_finite"], "exec_module" in vars(sklearn.__loader__))
        print("def get_config" in inspect.getsource(sklearn.get_config), len(sys.meta_path))
        import pandas
        print([finder for finder in sys.meta_path if "ambient" in type(finder).__module__])
        """
    )
    assert said.splitlines()[0] == "True False"
    assert said.splitlines()[1].startswith("True")
    assert said.splitlines()[2] == "[]"


def test_a_module_imported_behind_the_hook() -> None:
    said = run_here(
        """
        import pickle, sys
        ambient.write_all({"sklearn": pickle.dumps({"assume_finite": True})})
        hook = sys.meta_path.pop(0)
        import sklearn
        ambient.read_all(False)
        print(sklearn.get_config()["assume_finite"])
        """
    )
    assert said == "True\n"


def test_random_numbers_go_on_where_they_stopped() -> None:
    said = run_here(
        """
        import random
        random.seed(1)
        state = ambient.read_all(False)
        first = [random.random() for _ in range(3)]
        assert ambient.read_all(False) != state
        ambient.write_all(state)
        print(first == [random.random() for _ in range(3)])
        """
    )
    assert said == "True\n"


def test_what_was_set_is_taken_back() -> None:
    said = run_here(
        """
        import logging, os, sys, warnings
        import matplotlib
        os.environ["KEPT"] = "1"
        before = ambient.read_all(True)
        os.environ["NEW"], os.environ["PATH"] = "1", "changed"
        sys.path.insert(1, "/new")
        matplotlib.rcParams["lines.linewidth"] = 9
        logging.getLogger("app").setLevel("INFO")
        logging.basicConfig()
        warnings.simplefilter("ignore")
        path = list(sys.path)
        changed = ambient.read_all(True)
        ambient.write_all(before)
        assert ambient.read_all(True) == before
        print(os.environ.get("NEW"), os.environ["PATH"] != "changed", "/new" in sys.path)
        print(logging.root.handlers, logging.getLogger("app").level)
        print(matplotlib.rcParams["lines.linewidth"])
        ambient.write_all(changed)
        assert ambient.read_all(True) == changed
        print(path == sys.path)
        """
    )
    assert said.splitlines() == ["None True False", "[] 0", "1.5", "True"]


def test_filters_of_libraries_stay_in_place() -> None:
    said = run_here(
        """
        import warnings
        class Special(Warning): pass
        before = ambient.AMBIENT["warnings"].read()
        warnings.simplefilter("always", Special)
        ambient.AMBIENT["warnings"].write(before)
        print(warnings.filters[0][2].__name__)
        warnings.simplefilter("ignore")
        ignoring = ambient.AMBIENT["warnings"].read()
        ambient.AMBIENT["warnings"].write(before)
        ambient.AMBIENT["warnings"].write(ignoring)
        print([f[2].__name__ for f in warnings.filters[:2]])
        warnings.warn("silent", Special)
        """
    )
    assert said.splitlines() == ["Special", "['Warning', 'Special']"]


def test_handlers_of_libraries_and_unknown_ones_are_left_alone(tmp_path: Path) -> None:
    said = run_here(
        """
        import json, logging
        logging.getLogger("json").addHandler(logging.StreamHandler())
        logging.getLogger("json").setLevel("ERROR")
        logging.getLogger("app").addHandler(logging.NullHandler())
        logging.getLogger("app").addHandler(logging.FileHandler("x.log"))
        before = ambient.read_all(False)["logging"]
        assert b"stderr" not in before and b"x.log" not in before and b"json" in before
        ambient.write_all({"logging": before})
        print([len(logging.getLogger(name).handlers) for name in ("json", "app")])
        """,
        cwd=tmp_path,
    )
    assert said == "[1, 2]\n"


def test_failures_are_told_and_do_not_stop_the_rest(tmp_path: Path) -> None:
    said = run_here(
        """
        import pickle, sys
        limit = sys.getrecursionlimit()
        failures = ambient.write_all({
            "cwd": pickle.dumps("/no/such/directory"),
            "interpreter": pickle.dumps(limit + 1),
            "from the future": b"",
        })
        print(sys.getrecursionlimit() - limit, failures)
        """,
        cwd=tmp_path,
    )
    assert said.startswith("1 [")
    assert "cwd: FileNotFoundError" in said


def test_a_deleted_working_directory_is_no_state(tmp_path: Path) -> None:
    said = run_here(
        """
        import os
        os.mkdir("gone"); os.chdir("gone"); os.rmdir("../gone")
        print("cwd" in ambient.read_all(True))
        """,
        cwd=tmp_path,
    )
    assert said == "False\n"


def test_only_what_makes_sense_on_another_machine() -> None:
    shared = {name for name, adapter in AMBIENT.items() if adapter.same_machine}
    assert shared == {"cwd", "environ", "sys.path", "logging.files"}
    assert not shared & set(read_all(False))
    assert write_all({}) == []
