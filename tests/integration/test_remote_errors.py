"""What a remote cell raises is the cell's own error: shown once, with its type and its lines."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
import pytest
from live import Cell, Notebook, opened
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError


def plain(cell: Cell) -> str:
    """The traceback without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", cell.traceback)


def test_line_numbers_are_those_of_the_cell(notebook: Notebook) -> None:
    cell = notebook.fail("%%remote\n\nx = 1\nx / 0\n")
    assert cell.kinds == ["error"]
    assert cell.error == ("ZeroDivisionError", "division by zero")
    assert f"In[{cell.reply['execution_count']}], line 4" in plain(cell)
    assert "----> 4 x / 0" in plain(cell)


def test_functions_of_other_cells_show_their_source(notebook: Notebook) -> None:
    first = notebook.run("def inner(a):\n    # a comment\n    return 1 / a")
    second = notebook.run("def outer(a):\n    return inner(a)")
    cell = notebook.fail("%%remote\ndef own(a):\n    return outer(a)\nown(0)")
    text = plain(cell)
    counts = [each.reply["execution_count"] for each in (cell, cell, second, first)]
    places = re.findall(r"In\[(\d+)\], line (\d+)", text)
    assert places == [(str(count), line) for count, line in zip(counts, "4323", strict=True)]
    assert "return 1 / a" in text and "return inner(a)" in text and "return outer(a)" in text
    # Later, a function that was defined on the machine fails here.
    assert "return outer(a)" in plain(notebook.fail("own(0)"))


@pytest.mark.parametrize(
    ("raising", "check"),
    [
        ("raise ValueError('a', 2)", "type(e) is ValueError and e.args == ('a', 2)"),
        ("{}['key']", "type(e) is KeyError and e.args == ('key',)"),
        ("open('/not/there')", "type(e) is FileNotFoundError and e.filename == '/not/there'"),
        ("import json; json.loads('{')", "type(e) is __import__('json').JSONDecodeError and e.pos"),
        ("import numpy; numpy.zeros(2) + numpy.zeros(3)", "type(e) is ValueError"),
        ("raise Own('x', code=5)", "type(e) is Own and e.code == 5"),
        ("class Remote(Exception): pass\nraise Remote(3)", "type(e) is Remote and e.args == (3,)"),
    ],
)
def test_the_type_is_the_same(notebook: Notebook, raising: str, check: str) -> None:
    notebook.run(
        "import sys\n"
        "class Own(Exception):\n"
        "    def __init__(self, text, *, code):\n"
        "        super().__init__(text)\n"
        "        self.code = code"
    )
    cell = notebook.fail("%%remote\n" + raising)
    assert cell.kinds == ["error"]
    assert notebook.evaluate(f"(lambda e: bool({check}))(sys.last_value)") == "True"


def test_it_can_be_caught_by_its_type(notebook: Notebook) -> None:
    cell = notebook.run(
        "try:\n"
        "    get_ipython().run_cell_magic('remote', 'quiet', \"[][1]\")\n"
        "except IndexError as error:\n"
        "    print('caught', error)"
    )
    assert "caught list index out of range" in cell.stdout


def test_chains_are_kept(notebook: Notebook) -> None:
    cell = notebook.fail(
        "%%remote\n"
        "try:\n"
        "    {}['first']\n"
        "except KeyError as error:\n"
        "    raise RuntimeError('second') from error"
    )
    assert "direct cause of the following" in plain(cell)
    assert notebook.evaluate("repr(sys.last_value.__cause__)") == "\"KeyError('first')\""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="ExceptionGroup came with Python 3.11")
def test_groups_are_kept(notebook: Notebook) -> None:
    code = "raise ExceptionGroup('both', [ValueError(1), TypeError('t')])"
    local, remote = notebook.fail(code), notebook.fail("%%remote\n" + code)
    # IPython prints the tree of a group on stderr.
    assert remote.kinds == local.kinds == ["stderr"]
    assert "| ValueError: 1" in remote.stderr and "| TypeError: t" in remote.stderr
    found = notebook.evaluate("list(map(repr, sys.last_value.exceptions))")
    assert found == "['ValueError(1)', \"TypeError('t')\"]"


def test_syntax_errors(notebook: Notebook) -> None:
    cell = notebook.fail("%%remote\nx = 1\nif x\n    pass")
    assert cell.error[0] == "SyntaxError"
    assert "line 3" in plain(cell) or "[3]" in plain(cell) or ", line 3" in cell.error[1]
    assert "if x" in plain(cell)


@pytest.mark.parametrize("leave", ["raise SystemExit(3)", "import sys; sys.exit('bye')"])
def test_system_exit_is_as_in_a_local_cell(notebook: Notebook, leave: str) -> None:
    local, remote = notebook.fail(leave), notebook.fail("%%remote\n" + leave)
    assert remote.kinds == local.kinds
    assert remote.error == local.error
    assert notebook.remote("1 + 1").result == "2"


def test_an_exception_that_cannot_travel_has_a_stand_in(notebook: Notebook) -> None:
    cell = notebook.fail(
        "%%remote\n"
        "class Picky(Exception):\n"
        "    def __init__(self, a, b):\n"
        "        super().__init__(f'{a} and {b}')\n"
        "raise Picky(1, 2)"
    )
    assert cell.error == ("Picky", "1 and 2")
    assert cell.kinds == ["error"]
    unpicklable = notebook.fail(
        "%%remote\n"
        "class Holder(Exception):\n"
        "    def __reduce__(self):\n"
        "        raise TypeError('no')\n"
        "raise Holder('text')"
    )
    assert unpicklable.error == ("Holder", "text")
    assert unpicklable.kinds == ["error"]
    assert notebook.evaluate("isinstance(sys.last_value, Exception)") == "True"


def test_tb_shows_it_again_and_the_kernel_is_usable(notebook: Notebook) -> None:
    failing = notebook.fail("%%remote\nvery_wrong = 1\nraise LookupError('nowhere')")
    again = notebook.run("%tb")
    assert "LookupError" in again.stdout + str(again.of("error"))
    assert "raise LookupError" in again.stdout + str(again.of("error"))
    assert failing.error[1] == "nowhere"
    assert notebook.evaluate("very_wrong") == "1"


def test_an_error_while_the_cell_prints_stays_in_order(notebook: Notebook) -> None:
    cell = notebook.fail("%%remote\nprint('before')\n1/0\nprint('never')")
    assert cell.kinds == ["stdout", "error"]
    assert cell.stdout == "before\n"


def test_names_bound_before_the_error_come_back(notebook: Notebook) -> None:
    notebook.run("grown = []")
    notebook.fail("%%remote\ngrown.append(1)\nfresh = 2\nundefined_name")
    assert notebook.evaluate("(grown, fresh)") == "([1], 2)"


@pytest.mark.parametrize(
    ("line", "hint"), [("gpu=H100", "mlinfra doctor"), ("gpu=H100 on=local", "Leave gpu= out")]
)
def test_an_error_of_the_machinery_names_what_and_what_to_do(
    notebook: Notebook, line: str, hint: str
) -> None:
    cell = notebook.fail(f"%%remote {line}\n1")
    assert cell.error[0] == "RequestError"
    assert "gpu=H100" in cell.error[1] and hint in cell.error[1]
    assert "Traceback" not in plain(cell)


def _notebook(tmp_path: Path, *sources: str) -> NotebookClient:
    node = nbformat.v4.new_notebook()
    node.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    resources = {"metadata": {"path": str(tmp_path)}}
    return NotebookClient(node, timeout=60, kernel_name="python3", resources=resources)


def test_run_all_stops(tmp_path: Path) -> None:
    with opened(tmp_path / "environment") as notebook:
        environment = notebook.environment
        client = _notebook(
            tmp_path,
            "%load_ext jupyter_mlinfra",
            "%%remote\nraise ValueError('stop here')",
            "print('not reached')",
        )
        with pytest.raises(CellExecutionError) as raised:
            client.execute(env=environment)
        assert (raised.value.ename, raised.value.evalue) == ("ValueError", "stop here")
        kinds = [output["output_type"] for output in client.nb.cells[1].outputs]
        assert kinds == ["display_data", "error"]
        assert client.nb.cells[2].outputs == []


def test_run_all_goes_on_where_an_error_is_expected(tmp_path: Path) -> None:
    with opened(tmp_path / "environment") as notebook:
        environment = notebook.environment
        client = _notebook(
            tmp_path,
            "%load_ext jupyter_mlinfra",
            "%%remote\nraise ValueError('expected')",
            "%%remote quiet\nprint('reached')",
        )
        client.nb.cells[1].metadata.tags = ["raises-exception"]
        client.execute(env=environment)
        assert client.nb.cells[2].outputs[0]["text"] == "reached\n"
