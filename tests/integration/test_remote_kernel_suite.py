"""jupyter_kernel_test against a kernel whose cells all run on a machine.

The kernel is a plain ipykernel that puts ``%%remote quiet`` in front of every cell. What the
suite asks beside execution (completion, inspection, history, is_complete) stays with the local
kernel: it has all variables. ``test_history`` fails with plain ipykernel 7.4 too (its `range` part
asks for a session by number); the verdicts of both kernels must be the same.
"""

from __future__ import annotations

import json
import sys
import unittest
from pathlib import Path
from typing import Any

import jupyter_kernel_test
import pytest
from live import ROOT, Notebook, opened

ALL_REMOTE = """
import os
def everything_remote(lines):
    own = ("%%remote", "#%%remote")
    if os.environ.get("EVERYTHING") and not lines[0].startswith(own):
        return ["%%remote quiet\\n", *lines]
    return lines
everything_remote.has_side_effects = True
get_ipython().input_transformers_cleanup.append(everything_remote)
os.environ["EVERYTHING"] = "1"
"""


class Samples(jupyter_kernel_test.KernelTests):  # type: ignore[misc]
    """What ipykernel's own tests give the suite."""

    __test__ = False  # its tests run through `verdicts`

    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('test', file=sys.stderr)"
    completion_samples = [{"text": "zi", "matches": {"zip"}}]  # noqa: RUF012
    complete_code_samples = ["1", "print('hello, world')", "def f(x):\n  return x*2\n\n\n"]  # noqa: RUF012
    incomplete_code_samples = ["print('''hello", "def f(x):\n  x*2"]  # noqa: RUF012
    invalid_code_samples = ["import = 7q"]  # noqa: RUF012
    code_page_something = "zip?"
    code_generate_error = "raise"
    code_execute_result = [{"code": f"{n}+{n}", "result": f"{2 * n}"} for n in (1, 2, 4, 5)]  # noqa: RUF012
    code_display_data = [  # noqa: RUF012
        {"code": "from IPython.display import HTML, display\ndisplay(HTML('<b>x</b>'))"}
        | {"mime": "text/html"},
        {"code": "display(None)", "mime": "text/plain"},
    ]
    code_history_pattern = "1?+*"
    supported_history_operations = ("tail", "range", "search")
    code_inspect_sample = "zip"
    code_clear_output = "from IPython.display import clear_output; clear_output()"


del jupyter_kernel_test.KernelTests  # else unittest's loader runs it by itself


def verdicts(kernel_name: str) -> dict[str, str]:
    """Name of each test and what became of it."""
    kind = type("Suite", (Samples,), {"kernel_name": kernel_name})
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(kind)
    found = {test.id().rpartition(".")[2]: "passed" for test in suite}
    result = unittest.TestResult()
    suite.run(result)
    for what, items in (
        ("failed", result.failures),
        ("failed", result.errors),
        ("skipped", result.skipped),
    ):
        for test, text in items:
            name = getattr(test, "test_case", test).id().rpartition(".")[2]
            found[name] = f"{what}: {text.strip().splitlines()[-1]}"
    return found


def test_all_as_with_a_plain_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec: dict[str, Any] = {
        "argv": [
            sys.executable,
            *("-m", "ipykernel_launcher", "-f", "{connection_file}"),
            "--InteractiveShellApp.extensions=jupyter_mlinfra",
            f"--InteractiveShellApp.exec_lines={ALL_REMOTE}",
        ],
        "display_name": "Everything remote",
        "language": "python",
    }
    folder = tmp_path / "jupyter" / "kernels" / "everything-remote"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec))
    with opened(tmp_path / "notebook") as notebook:
        for name, value in notebook.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("PYTEST_CURRENT_TEST")
        monkeypatch.setenv("JUPYTER_PATH", str(folder.parents[1]))
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "plain"))
        expected = verdicts("python3")
        monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "remote"))
        found = verdicts("everything-remote")
        runs = notebook.run("%remote machines").stdout
    assert found == expected
    failed = {name for name, verdict in expected.items() if verdict != "passed"}
    assert failed <= {"test_history"} and len(expected) >= 12
    assert "No machine runs" in runs  # it went with its kernel
    assert (ROOT / "sdk").is_dir()


OWN_TESTS = """
import os, pytest
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
class Verdicts(dict):
    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self[report.nodeid] = report.outcome
_verdicts = Verdicts()
_status = pytest.main(
    ["--pyargs", "ipywidgets.widgets.tests.{module}", "-qs", "-c", os.devnull]
    + ["-p", "no:cacheprovider"],
    plugins=[_verdicts],
)
{name} = dict(_verdicts)
"""


@pytest.mark.parametrize(
    "module",
    [
        f"test_{name}"
        for name in ("interaction", "link", "send_state", "set_state", "widget_output")
    ],
)
def test_tests_of_ipywidgets_pass_there_as_here(notebook: Notebook, module: str) -> None:
    """They come with the package; each kernel answers what they ask of comms."""
    notebook.run(OWN_TESTS.format(name="here", module=module))
    notebook.run("%%remote\n" + OWN_TESTS.format(name="there", module=module))
    assert notebook.run("here == there, set(here.values())").result == "(True, {'passed'})"
