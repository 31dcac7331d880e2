"""Process-global state that follows the cells: random numbers, options, working directory...

A cell that runs on the machine must find what the cells before it have set, wherever they ran.
Each piece of state has an :class:`Adapter` that reads and writes it as opaque bytes; what they are
is in :mod:`mlinfra_sdk.namespace.ambient_state`. Nothing is imported for it: a value for a module
that is not loaded yet is kept, and set as soon as the module has been imported.

Left out, because it cannot be read or cannot be copied: the seed of string hashes, how far CUDA's
random generators are (their seed follows ``torch.manual_seed``), locale, signal handlers, threads
and event loops, replaced ``sys.stdout``/``showwarning``/hooks, patched modules and classes,
attributes of modules, open figures, the matplotlib backend, log handlers other than plain stream
and file handlers.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import io
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import cloudpickle

from mlinfra_sdk.namespace import ambient_state as state
from mlinfra_sdk.namespace import places


@dataclass(frozen=True)
class Adapter:
    """One piece of process-global state.

    ``read()`` gives it as opaque bytes (equal bytes: equal state) or None where its module is not
    loaded. ``write(data)`` sets it; where the module is not loaded yet this happens when it is.
    After a write compare with a fresh ``read()``, not with what was written: each side keeps what
    only it has (filters of its own libraries, options of another version).
    ``same_machine``: meaningful only where both sides share machine and file system.
    Read and write in the thread and context that run the cells: some state belongs to them.
    """

    name: str
    get: Callable[[], Any]
    set: Callable[[Any], None]
    module: str | None = None
    same_machine: bool = False

    def read(self) -> bytes | None:
        if self.module is not None and self.module not in sys.modules:
            return _on_import.waiting(self)
        value = self.get()
        return None if value is None else _encode(value)

    def write(self, data: bytes) -> None:
        if self.module is not None and self.module not in sys.modules:
            _on_import.add(self, self.module, data)
        else:
            self.set(pickle.loads(data))


def read_all(same_machine: bool) -> dict[str, bytes]:
    """The state of every adapter that applies and whose module is loaded here."""
    _on_import.apply_loaded()
    values = {}
    for name, adapter in AMBIENT.items():
        if same_machine or not adapter.same_machine:
            try:
                value = adapter.read()
            except Exception:  # state that cannot be read (a deleted directory) stays behind
                continue
            if value is not None:
                values[name] = value
    return values


def write_all(values: Mapping[str, bytes]) -> list[str]:
    """Write each value; return one line of text for each that could not be set."""
    failures = []
    for name, data in values.items():
        adapter = AMBIENT.get(name)
        if adapter is not None:
            try:
                adapter.write(data)
            except Exception as error:
                failures.append(f"{name}: {type(error).__name__}: {error}")
    return failures


class _OnImport(importlib.abc.MetaPathFinder):
    """Sets waiting values right after their module has been imported."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[str, tuple[Adapter, bytes]]] = {}
        self._finding = False

    def waiting(self, adapter: Adapter) -> bytes | None:
        _, data = self._waiting.get(adapter.module or "", {}).get(adapter.name, (None, None))
        return data

    def add(self, adapter: Adapter, module: str, data: bytes) -> None:
        self._waiting.setdefault(module, {})[adapter.name] = (adapter, data)
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def apply_loaded(self) -> None:
        """For modules that came in by a way that :meth:`find_spec` does not see."""
        for module in [name for name in self._waiting if name in sys.modules]:
            self._apply(module)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._waiting or self._finding:
            return None
        self._finding = True
        try:
            finders = (finder for finder in sys.meta_path if finder is not self)
            specs = (finder.find_spec(fullname, path, target) for finder in finders)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self._finding = False
        loader: Any = spec.loader if spec is not None else None
        if hasattr(loader, "exec_module") and hasattr(loader, "__dict__"):
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module
                execute(module)
                self._apply(fullname)

            loader.exec_module = exec_module
        return spec

    def _apply(self, module: str) -> None:
        for adapter, data in self._waiting.pop(module, {}).values():
            try:
                adapter.set(pickle.loads(data))
            except Exception as error:
                warnings.warn(
                    f"The {adapter.name} state of the remote cells could not be set here: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        if not self._waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


_on_import = _OnImport()


def _encode(value: object) -> bytes:
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 5)
    # Without memo: equal values give equal bytes, whatever objects they share.
    pickler.fast = True
    try:
        pickler.dump(value)
        data = buffer.getvalue()
    except Exception:
        data = b"__main__"
    if b"__main__" in data:  # functions of the notebook (formatters) go by value
        data = bytes(cloudpickle.dumps(value))
    return data


PLACES = ("cwd", "sys.path", "workspace.cwd", "workspace.sys.path")
"""What has to be set before anything is imported."""

AMBIENT: dict[str, Adapter] = {
    adapter.name: adapter
    for adapter in (
        Adapter("random", state.get_random, state.set_random),
        Adapter("cwd", state.get_cwd, state.set_cwd, same_machine=True),
        Adapter("environ", state.environ.get, state.environ.set, same_machine=True),
        Adapter("sys.path", state.sys_path.get, state.sys_path.set, same_machine=True),
        Adapter("workspace.cwd", places.get_cwd, places.set_cwd),
        Adapter("workspace.sys.path", places.get_sys_path, places.set_sys_path),
        Adapter("interpreter", state.get_interpreter, state.set_interpreter),
        Adapter("warnings", state.get_warnings, state.set_warnings),
        Adapter("decimal", state.get_decimal, state.set_decimal, "decimal"),
        Adapter("logging", state.stream_logging.get, state.stream_logging.set),
        Adapter("logging.files", state.file_logging.get, state.file_logging.set, same_machine=True),
        Adapter("ipython", state.get_ipython, state.set_ipython, "IPython"),
        Adapter("numpy", state.get_numpy, state.set_numpy, "numpy"),
        Adapter("numpy.random", state.get_numpy_random, state.set_numpy_random, "numpy.random"),
        Adapter("pandas", state.get_pandas, state.set_pandas, "pandas"),
        Adapter("matplotlib", state.get_matplotlib, state.set_matplotlib, "matplotlib"),
        Adapter(
            "matplotlib.inline", state.get_inline, state.set_inline, "matplotlib_inline.config"
        ),
        Adapter("sklearn", state.get_sklearn, state.set_sklearn, "sklearn"),
        Adapter("torch", state.get_torch, state.set_torch, "torch"),
        Adapter("torch.random", state.get_torch_random, state.set_torch_random, "torch"),
    )
}
