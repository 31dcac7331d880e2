"""Tracebacks as data: where an exception came from, so that the other side can show it.

Frames cannot travel. A rebuilt traceback has stand-ins with their files, names and lines, but
without their variables.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, TracebackType

import msgspec

_MACHINERY = ("IPython.", "ipykernel.", "mlinfra_sdk.", "asyncio.", "concurrent.")
"""Modules whose frames lie between the user's code and the kernel."""


class _Place(msgspec.Struct, frozen=True, array_like=True):
    """One frame: what its code is called and which part of it was running."""

    filename: str
    function: str
    module: str
    line: int
    end_line: int
    column: int
    end_column: int


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[_Place, ...]).decode


def flatten(traceback: TracebackType | None) -> tuple[bytes, set[str]]:
    """A traceback as bytes, without the machinery above the user's code; and its files."""
    steps = list(_steps(traceback))
    user = list(itertools.dropwhile(lambda step: _is_machinery(step), steps))
    places = [_place(step) for step in user or steps]
    return _encode(places), {place.filename for place in places}


def rebuild(data: bytes) -> TracebackType | None:
    """The inverse of :func:`flatten`."""
    traceback = None
    for place in reversed(_decode(data)):
        stand_in = _stand_in(place)
        traceback = TracebackType(traceback, stand_in.tb_frame, stand_in.tb_lasti, place.line)
    return traceback


def _steps(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _is_machinery(step: TracebackType) -> bool:
    return str(step.tb_frame.f_globals.get("__name__", "")).startswith(_MACHINERY)


def _place(step: TracebackType) -> _Place:
    code = step.tb_frame.f_code
    line, end_line, column, end_column = _position(code, step.tb_lasti)
    if line is None or end_line is None or column is None or end_column is None:
        line, end_line, column, end_column = step.tb_lineno, step.tb_lineno, -1, -1
    module = str(step.tb_frame.f_globals.get("__name__", ""))
    return _Place(code.co_filename, code.co_name, module, line, end_line, column, end_column)


def _position(code: CodeType, instruction: int) -> tuple[int | None, ...]:
    """(line, end line, column, end column) of an instruction, since Python 3.11."""
    positions = getattr(code, "co_positions", None)
    if positions is None or instruction < 0:
        return None, None, None, None
    found: tuple[int | None, ...] = next(itertools.islice(positions(), instruction // 2, None))
    return found


@lru_cache(maxsize=1024)
def _stand_in(place: _Place) -> TracebackType:
    """A frame that looks like the one at ``place``: code that raises just there."""
    tree = ast.parse("raise Exception")
    for node in ast.walk(tree):
        if isinstance(node, (ast.stmt, ast.expr)):
            node.lineno, node.end_lineno = place.line, place.end_line
            node.col_offset, node.end_col_offset = place.column, place.end_column
    code = compile(tree, place.filename, "exec").replace(co_name=place.function)
    try:
        exec(code, {"__name__": place.module, "__file__": place.filename})
    except Exception as error:
        assert error.__traceback__ is not None and error.__traceback__.tb_next is not None
        return error.__traceback__.tb_next
    raise AssertionError
