"""The face: a session is one notebook's or script's connection to one machine."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from mlinfra_sdk.errors import MlinfraError
from mlinfra_sdk.frontend import Console, Frontend
from mlinfra_sdk.namespace.analysis import CellNames, cell_names
from mlinfra_sdk.namespace.sync import RemoteValue
from mlinfra_sdk.running import Result
from mlinfra_sdk.sync.reports import Move
from mlinfra_sdk.sync.reports import Report as FilesReport
from mlinfra_sdk.unattended import Unattended

T = TypeVar("T")


class Session(Unattended):
    """A connection to one machine, on which a kernel holds what it was given.

    >>> with Session() as session:
    ...     session.run("x = 6 * 7")
    ...     session.namespace["x"]
    42

    ``namespace`` are the variables that runs read and change; by default those of ``__main__``.
    Settings are those of ``%%remote``: ``Session(on="local", idle="30m")``. The machine starts with
    the first use, and is stopped by :meth:`close`, or when this process ends, unless it was given
    a name by ``machine``.

    With ``trial`` nothing that runs do appears here but in ``namespace``: neither files that they
    write nor what they do to random generators and other state of modules.

    Threads may share a session; their runs take place one after the other.
    """

    _count = 0
    """Cells that :meth:`run` has run."""

    def run(self, code: str, *, frontend: Frontend | None = None) -> Any:
        """Run code on the machine and wait for its end; gives the value of its last expression.

        Its outputs appear here, what it changes comes back, and what it raises is raised.
        """
        names = cell_names(_transformed(code), self.namespace, code)
        self._count += 1
        result = self.execute(code, names, frontend=frontend or Console(), count=self._count)
        return result.get()

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function on the machine and give what it returns; arguments that it changes in
        place are changed here too. A coroutine function is awaited over there."""
        name = "__mlinfra_call__"
        code = f"{name}[0](*{name}[1], **{name}[2])"
        if inspect.iscoroutinefunction(function):
            code = f"await {code}"
        with self._lock:
            try:
                result = self._execute(
                    code,
                    lambda: self._local.prepare_values({name: (function, args, kwargs)}),
                    frontend=Console(),
                    count=0,
                    kind="call",
                )
            finally:
                self.namespace.pop(name, None)
        if result.error is not None and result.error.__traceback__ is not None:
            # The user did not write the code above.
            result.error.__traceback__ = result.error.__traceback__.tb_next
        value: T = result.get()
        return value

    def push(self, **values: Any) -> None:
        """Bind values to names over there (and here)."""
        self.namespace.update(values)
        result = self._execute(
            "",
            lambda: self._local.prepare_values(values),
            frontend=Console(),
            count=0,
            kind="push",
        )
        result.get()

    def pull(self, *names: str) -> Any:
        """Bring variables here, whatever their size; gives the value, or a list of several."""
        for name in names:
            value = self.namespace.get(name)
            if isinstance(value, RemoteValue):
                value.pull()
        values = [self._pulled(name) for name in names]
        return values[0] if len(names) == 1 else values

    def sync(
        self, *paths: str, delete: bool = False, frontend: Frontend | None = None
    ) -> FilesReport:
        """Make the notebook's folder and its twin on the machine alike now; runs do so by
        themselves. ``paths`` are files or folders to be fetched, however large they are;
        ``delete`` confirms deletions in large numbers."""
        with self._lock:
            client = self._connect(frontend)
            with self._recorded(client, "down" if paths else "up", "files"):
                return self._files.sync(self.request, paths, frontend or Console(), delete=delete)

    def stays_there(self, path: str) -> int | None:
        """The size of a file of the notebook's folder that lies on the machine and not here, being
        too large to come by itself; None for others. Asks nobody."""
        return self._files.stays_there(path)

    def sync_preview(self) -> list[Move]:
        """What :meth:`sync` would do."""
        with self._lock:
            self._connect()
            return self._files.preview(self.request)

    def _pulled(self, name: str) -> Any:
        try:
            return self.namespace[name]
        except KeyError:
            raise MlinfraError(
                f"There is no variable {name!r}, here or on the machine.",
                hint="Check the spelling; variables come here by themselves after a run.",
            ) from None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def refresh(self) -> None:
        """Bring here what widget callbacks over there have changed since the last run."""
        if not self._comms_passed or self._client is None or self._client.closed is not None:
            return
        self._comms_passed = False
        names = CellNames(frozenset(self._local.known()), frozenset(), frozenset(), False)
        self._execute(
            "", lambda: self._local.prepare(names), frontend=Console(), count=0, kind="pull"
        )

    def execute(
        self,
        code: str,
        names: CellNames,
        *,
        frontend: Frontend,
        count: int,
        cell: str = "",
    ) -> Result:
        """Run a cell; what it raises is in the result, errors of ours are raised."""
        return self._execute(
            code,
            lambda: self._local.prepare(names, code),
            frontend=frontend,
            count=count,
            kind="cell",
            cell=cell,
            imports=names.imports,
        )


def _transformed(code: str) -> str:
    """Code after IPython's input transformation, without a shell."""
    from IPython.core.inputtransformer2 import TransformerManager

    with contextlib.suppress(SyntaxError):
        return TransformerManager().transform_cell(code)
    return code
