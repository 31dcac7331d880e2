"""A session's workspace, kept alike before and after runs on machines with files of their own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mlinfra_sdk import paths
from mlinfra_sdk.checkpoints.folder import name_of
from mlinfra_sdk.errors import LinkError, MlinfraError, RequestError
from mlinfra_sdk.frontend import Frontend
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.machines.files import AgentFiles
from mlinfra_sdk.machines.lifecycle import LiveMachine
from mlinfra_sdk.namespace import places
from mlinfra_sdk.objects.store import ChunkStore
from mlinfra_sdk.spec import Request
from mlinfra_sdk.sync.carry import Progress
from mlinfra_sdk.sync.knowledge import workspace_name
from mlinfra_sdk.sync.reports import Move, Report
from mlinfra_sdk.sync.workspace import Workspace

LATER = "What is left is brought with the next run, or by `%remote sync`."


class SessionFiles:
    """The folder ``root`` and its twin on the session's machine, if that has files of its own."""

    def __init__(self, root: Path | None, store: ChunkStore) -> None:
        self.root = Path(os.path.realpath(root or os.getcwd()))
        self._store = store
        self.trial = False
        """Whether nothing that runs write comes here; what they read goes there once."""
        self._brought = False
        self._workspace: Workspace | None = None
        self._link: tuple[AgentClient, LiveMachine] | None = None
        self._before = Report()
        self._excluded: set[Path] = set()

    @property
    def name(self) -> str:
        """What the folder's twin is called on machines."""
        return workspace_name(self.root)

    def watched(self, path: str) -> tuple[str, str]:
        """For :attr:`Execute.watch`: a folder of the user's own checkpoints, if there is one."""
        return (name_of(self.name, path), path) if path else ("", "")

    def exclude(self, path: Path) -> None:
        """Do not carry this folder: it gets to the machine on another way."""
        if path not in self._excluded:
            self._excluded.add(path)
            if self._workspace is not None:
                self._workspace.exclude(path)

    def connected(
        self, client: AgentClient, machine: LiveMachine, *, shared: bool, sync: bool
    ) -> None:
        """The session has this connection now; ``shared``: the machine has our files."""
        self._workspace = None
        self._brought = False
        self._link = None if shared else (client, machine)
        if sync and not shared:  # also what is prepared before the first sync works there
            places.register(workspace_name(self.root), str(self.root))

    def disconnected(self) -> None:
        """It has none."""
        self._workspace = self._link = None

    def forget(self) -> None:
        """The machine is going to be stopped."""
        if self._workspace is not None:
            self._workspace.forget()
        self.disconnected()

    def _active(self, request: Request) -> Workspace | None:
        """The workspace, unless there is nothing to keep alike."""
        if self._link is None or not request.sync:
            return None
        if self._workspace is None:
            client, machine = self._link
            data = paths.data_dir()
            self._workspace = Workspace(
                self.root,
                AgentFiles(client),
                self._store,
                machine=machine.id,
                machine_name=machine.name,
                state=data / "sync",
                excluded=[data, *self._excluded],
            )
        self._workspace.eager_limit = request.eager_limit
        self._workspace.sync_limit = request.sync_limit
        return self._workspace

    def before_run(self, request: Request, frontend: Frontend) -> None:
        """Bring the machine what has changed here. Raises where that cannot be done: the run would
        see other files."""
        self._before = Report()
        workspace = self._active(request)
        if workspace is not None and not (self.trial and self._brought):
            self._brought = True
            self._before = workspace.sync(_progress(frontend))
            places.register(workspace.name, str(self.root))
            workspace.stale = True  # whatever the run does

    def after_run(self, request: Request, frontend: Frontend) -> Report:
        """Bring here what the run has written. What cannot be brought is said, and no error: the
        run is over, and what it has written is safe on the machine."""
        report, self._before = self._before, Report()
        workspace = self._active(request)
        if workspace is None or self.trial:
            return report
        try:
            after = workspace.sync(_progress(frontend))
        except KeyboardInterrupt:
            report.warnings.append(f"The files of the run were not all brought here. {LATER}")
        except LinkError:
            report.warnings.append(f"The machine cannot be reached. {LATER}")
        except MlinfraError as error:
            report.warnings.append(str(error))
        else:
            report.sent += after.sent
            report.received, report.removed = after.received, after.removed
            report.listed = after.listed
            report.warnings += after.warnings
        return report

    def sync(
        self, request: Request, names: Sequence[str], frontend: Frontend, *, delete: bool
    ) -> Report:
        """Make both sides alike now, and fetch what the names say."""
        workspace = self._require(request)
        workspace.stale = True
        fetch = {workspace.relative(name) for name in names}
        return workspace.sync(_progress(frontend), fetch=fetch, delete=delete)

    def stays_there(self, path: str) -> int | None:
        """The size of a file that lies on the machine only; None if that is not known."""
        return self._workspace.stays_there(path) if self._workspace is not None else None

    def preview(self, request: Request) -> list[Move]:
        """What :meth:`sync` would do."""
        return self._require(request).preview()

    def _require(self, request: Request) -> Workspace:
        workspace = self._active(request)
        if workspace is None:
            raise RequestError(
                "sync=no is set." if not request.sync else "The machine uses this very folder.",
                hint="Set sync=yes." if not request.sync else "There is nothing to keep alike.",
            )
        return workspace


def _progress(frontend: Frontend) -> Progress:
    entered = False

    def progress(done: int, total: int) -> None:
        nonlocal entered
        if not entered:
            entered = True
            frontend.phase("data")
        frontend.progress(done, total)

    return progress
