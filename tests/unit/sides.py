"""A local and a worker namespace in one process, with stores of their own."""

from __future__ import annotations

import ast
import linecache
from pathlib import Path
from typing import Any

import msgspec

from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.namespace.sync import Inputs, LocalNamespace, Outputs, Report, WorkerNamespace
from mlinfra_sdk.objects.store import ChunkStore


def run_cell(code: str, ns: dict[str, Any], filename: str) -> Any:
    """Runs a cell; gives the value of its last expression."""
    lines = code.splitlines(keepends=True)
    linecache.cache[filename] = (len(code), None, lines, filename)
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, filename, "exec"), ns)
    if last is None:
        return None
    return eval(compile(ast.Expression(last.value), filename, "eval"), ns)


class Sides:
    """``local()`` and ``remote()`` run cells; everything between goes through msgpack."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.store = ChunkStore(root / "local")
        self.worker_store = ChunkStore(root / "worker")
        self.ns: dict[str, Any] = {"__name__": "__main__"}
        self.worker_ns: dict[str, Any] = {"__name__": "__main__"}
        self.namespace = LocalNamespace(
            self.ns, self.store, fetch=self._fetch, hidden=lambda: HIDDEN, **options
        )
        self.worker = WorkerNamespace(self.worker_ns, self.worker_store, hidden=lambda: HIDDEN)
        self.inputs = Inputs()
        self.outputs = Outputs()
        self.moved = 0
        self._cells = 0

    def local(self, code: str) -> Any:
        self._cells += 1
        return run_cell(code, self.ns, f"<local cell {self._cells}>")

    def remote(self, code: str) -> Report:
        """Runs a cell on the worker. A cell that raises is reported with its error."""
        self._cells += 1
        names = cell_names(code, self.ns, code)
        inputs = self.namespace.prepare(names, code)
        self.inputs = msgspec.msgpack.decode(msgspec.msgpack.encode(inputs), type=Inputs)
        self._copy(self.inputs.digests(), self.store, self.worker_store)
        self.worker.load(self.inputs)
        extra, error = {}, None
        try:
            value = run_cell(code, self.worker_ns, f"<remote cell {self._cells}>")
            if value is not None:
                extra = {"_": value}
            del value
        except Exception as raised:
            error = raised
        outputs = self.worker.collect(extra=extra, error=error)
        self.outputs = msgspec.msgpack.decode(msgspec.msgpack.encode(outputs), type=Outputs)
        self._copy(self.outputs.digests(), self.worker_store, self.store)
        return self.namespace.apply(self.outputs)

    def _fetch(self, token: str) -> Outputs:
        outputs = self.worker.fetch(token)
        self._copy(outputs.digests(), self.worker_store, self.store)
        return outputs

    def _copy(self, digests: list[bytes], source: ChunkStore, target: ChunkStore) -> None:
        for digest in target.missing(digests):
            data = source.read_chunk(digest)
            self.moved += len(data)
            target.put_chunk(data)


HIDDEN = frozenset({"__name__", "__builtins__", "_"})
