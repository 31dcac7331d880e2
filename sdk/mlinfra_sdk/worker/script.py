"""A script on the machine: as ``python FILE`` would run it, inside of the kernel.

So its outputs, its input and its interrupts go the way of a cell's; its variables stay there.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import io
import linecache
import os
import sys
import threading
import tokenize
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

from IPython.core.getipython import get_ipython

INTERRUPTED = 130


def run_script(name: str, path: str, source: bytes, arguments: list[str]) -> int:
    """Run ``source`` as ``__main__`` and give its exit status. ``name`` is how the user called the
    file at ``path``, which need not exist here."""
    main = types.ModuleType("__main__")
    vars(main).update(__file__=path, __builtins__=builtins)
    lines = _decoded(source).splitlines(keepends=True)
    linecache.cache[path] = (len(source), None, lines, path)
    threads = set(threading.enumerate())
    with _process_of(main, [name, *arguments], os.path.dirname(path)) as at_exit:
        status = _status(lambda: exec(compile(source, path, "exec"), vars(main)))
        _join_threads(threads)
        for handler in reversed(at_exit):
            status = _status(handler) or status
    return status


class ScriptFailed(Exception):
    """A detached script's exit status, unless that is 0."""

    def _render_traceback_(self) -> list[str]:
        return []  # the script has printed its own


def run_detached(name: str, path: str, source: bytes, arguments: list[str], *_: object) -> None:
    """As :func:`run_script`, for a run that fails if the script does."""
    status = run_script(name, path, source, arguments)
    if status:
        raise ScriptFailed(status)


def _decoded(source: bytes) -> str:
    with contextlib.suppress(SyntaxError, UnicodeDecodeError):
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
        return source.decode(encoding)
    return source.decode(errors="replace")


def _status(function: Callable[[], object]) -> int:
    """Call it as the interpreter calls a program: what ends it becomes an exit status."""
    try:
        function()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        _report(error)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _report(error: BaseException) -> None:
    # Without the frames of this module.
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    if sys.excepthook is sys.__excepthook__:
        traceback.print_exception(type(error), error.with_traceback(trace), trace)
    else:
        sys.excepthook(type(error), error.with_traceback(trace), trace)


def _join_threads(before: set[threading.Thread]) -> None:
    """Wait for threads as the interpreter does at its end; pools are told to end first."""
    for callback in reversed(getattr(threading, "_threading_atexits", [])):
        callback()
    for thread in threading.enumerate():
        if thread not in before and not thread.daemon:
            thread.join()


@contextlib.contextmanager
def _process_of(
    main: types.ModuleType, argv: list[str], folder: str
) -> Iterator[list[Callable[[], object]]]:
    """This process as the script's own; gives the functions that it wants called at its end."""
    at_exit: list[Callable[[], object]] = []

    def register(function: Any, *args: Any, **kwargs: Any) -> Any:
        def call() -> object:
            return function(*args, **kwargs)

        call.registered = function  # type: ignore[attr-defined]
        at_exit.append(call)
        return function

    def unregister(function: Any) -> None:
        at_exit[:] = [call for call in at_exit if call.registered != function]  # type: ignore[attr-defined]

    shell: Any = get_ipython()
    if os.environ.get("MPLBACKEND", "").startswith("module://matplotlib_inline"):
        del os.environ["MPLBACKEND"]
    with contextlib.ExitStack() as undo:
        for owner, name, value in (
            (sys, "argv", argv),
            (sys, "path", [folder, *sys.path]),
            (sys, "stdin", _Input()),
            (sys, "excepthook", sys.__excepthook__),
            (atexit, "register", register),
            (atexit, "unregister", unregister),
        ):
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        undo.callback(sys.modules.__setitem__, "__main__", sys.modules["__main__"])
        sys.modules["__main__"] = main
        if shell is not None:  # a script that looks for IPython must not find the kernel's
            undo.callback(_restore, shell, vars(builtins).pop("get_ipython", None))
            type(shell).clear_instance()
        yield at_exit


def _restore(shell: Any, function: Any) -> None:
    for kind in type(shell)._walk_mro():
        kind._instance = shell
    if function is not None:
        vars(builtins)["get_ipython"] = function


class _Input(io.TextIOBase):
    """stdin by the line, each asked of the client."""

    def readable(self) -> bool:
        return True

    def readline(self, size: int | None = -1) -> str:  # type: ignore[override]
        try:
            return input() + "\n"
        except EOFError:
            return ""

    def read(self, size: int | None = -1) -> str:
        return "".join(self)
