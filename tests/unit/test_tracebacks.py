from __future__ import annotations

import linecache
import textwrap
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from mlinfra_sdk.objects.tracebacks import flatten, rebuild

CODE = textwrap.dedent(
    """
    def outer(n):
        return outer(n - 1) if n else inner(
            n,
        )

    def inner(n):
        return [1, 2][n + 2]
    """
)


def raised(function: Callable[..., Any], *args: Any) -> Exception:
    try:
        function(*args)
    except Exception as error:
        return error
    raise AssertionError


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(type(error), error, error.__traceback__))


@pytest.fixture
def cell() -> dict[str, Any]:
    filename = "<a cell>"
    linecache.cache[filename] = (len(CODE), None, CODE.splitlines(True), filename)
    ns: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(CODE, filename, "exec"), ns)
    return ns


def test_a_rebuilt_traceback_shows_the_same(cell: dict[str, Any]) -> None:
    error = raised(cell["outer"], 2)
    before = shown(error)
    assert "in inner" in before and "[1, 2][n + 2]" in before
    data, files = flatten(error.__traceback__)
    assert files == {"<a cell>", __file__}
    error.__traceback__ = rebuild(data)
    assert shown(error) == before
    assert flatten(error.__traceback__) == (data, files)


def test_frames_above_the_users_code_are_left_out(cell: dict[str, Any]) -> None:
    machinery: dict[str, Any] = {"__name__": "IPython.core.interactiveshell"}
    exec("def run(function): return function()", machinery)
    error = raised(machinery["run"], lambda: machinery["run"](lambda: cell["inner"](0)))
    assert error.__traceback__ is not None
    data, _ = flatten(error.__traceback__.tb_next)
    names = [frame.name for frame in traceback.extract_tb(rebuild(data))]
    assert names == ["<lambda>", "run", "<lambda>", "inner"]


def test_an_error_of_the_machinery_keeps_its_frames() -> None:
    machinery: dict[str, Any] = {"__name__": "IPython.core.interactiveshell"}
    exec("def run(): raise OSError", machinery)
    error = raised(machinery["run"])
    assert error.__traceback__ is not None
    data, _ = flatten(error.__traceback__.tb_next)
    assert [frame.name for frame in traceback.extract_tb(rebuild(data))] == ["run"]


def test_no_traceback() -> None:
    assert rebuild(flatten(None)[0]) is None
