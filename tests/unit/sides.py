"""A local and a worker namespace with stores of their own, the worker here or in a process."""

from __future__ import annotations

import ast
import linecache
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from mlinfra_sdk.namespace.analysis import cell_names
from mlinfra_sdk.namespace.sync import Inputs, LocalNamespace, Outputs, Report, WorkerNamespace
from mlinfra_sdk.objects.store import ChunkStore

HIDDEN = frozenset({"__name__", "__builtins__", "_"})


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


class Worker:
    """A worker namespace; requests and replies are bytes."""

    def __init__(self, store: Path) -> None:
        self.ns: dict[str, Any] = {"__name__": "__main__"}
        self.store = ChunkStore(store)
        self.namespace = WorkerNamespace(self.ns, self.store, hidden=lambda: HIDDEN)

    def run(self, request: bytes, code: str, filename: str) -> bytes:
        inputs = msgspec.msgpack.decode(request, type=Inputs)
        self.namespace.load(inputs)
        extra: dict[str, Any] = {}
        raised: BaseException | None = None
        try:
            value = run_cell(code, self.ns, filename)
            if value is not None:
                extra["_"] = value
            del value
        except Exception as error:
            raised = error
        outputs = self.namespace.collect(extra=extra, error=raised)
        return msgspec.msgpack.encode(outputs)

    def fetch(self, token: str) -> bytes:
        return msgspec.msgpack.encode(self.namespace.fetch(token))


class ProcessWorker:
    """The same in another process."""

    def __init__(self, process: subprocess.Popen[bytes], store: Path) -> None:
        self.store = ChunkStore(store)
        self._process = process
        self._request("Worker", store)

    def _request(self, *request: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()
        ok, reply = pickle.load(self._process.stdout)
        if not ok:
            raise AssertionError(f"in the worker process: {reply}")
        return reply

    def run(self, *request: Any) -> bytes:
        return self._request("run", *request)  # type: ignore[no-any-return]

    def fetch(self, token: str) -> bytes:
        return self._request("fetch", token)  # type: ignore[no-any-return]


@contextmanager
def worker_process() -> Iterator[subprocess.Popen[bytes]]:
    """A process for ProcessWorkers, one at a time."""
    command = [sys.executable, __file__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        try:
            yield process
        finally:
            assert process.stdin
            process.stdin.close()


def serve() -> None:
    """What the worker process does."""
    import traceback

    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    worker: Worker | None = None
    while True:
        try:
            method, *arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            if method == "Worker":
                worker, reply = Worker(*arguments), None
                sys.modules["__main__"].__dict__.update(worker.ns)
            else:
                reply = getattr(worker, method)(*arguments)
            pickle.dump((True, reply), replies)
        except Exception:
            pickle.dump((False, traceback.format_exc()), replies)
        replies.flush()


class Sides:
    """``local()`` and ``remote()`` run cells; everything between goes through msgpack."""

    def __init__(self, root: Path, worker: Worker | ProcessWorker | None = None, **options: Any):
        self.store = ChunkStore(root / "local")
        self.worker = worker or Worker(root / "worker")
        self.ns: dict[str, Any] = {"__name__": "__main__"}
        self.namespace = LocalNamespace(
            self.ns, self.store, fetch=self._fetch, hidden=lambda: HIDDEN, **options
        )
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
        self.inputs = self.namespace.prepare(cell_names(code, self.ns, code), code)
        self._copy(self.inputs.digests(), self.store, self.worker.store)
        request = msgspec.msgpack.encode(self.inputs)
        reply = self.worker.run(request, code, f"<remote cell {self._cells}>")
        return self.namespace.apply(self._receive(reply))

    def _fetch(self, token: str) -> Outputs:
        return self._receive(self.worker.fetch(token))

    def _receive(self, reply: bytes) -> Outputs:
        self.outputs = msgspec.msgpack.decode(reply, type=Outputs)
        self._copy(self.outputs.digests(), self.worker.store, self.store)
        return self.outputs

    def _copy(self, digests: list[bytes], source: ChunkStore, target: ChunkStore) -> None:
        for digest in target.missing(digests):
            data = source.read_chunk(digest)
            self.moved += len(data)
            target.put_chunk(data)


if __name__ == "__main__":
    serve()
