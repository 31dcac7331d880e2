"""The error tree.

Every error that a user can meet says three things: what is wrong, where, and what to do about it
(the *hint*). Catch :class:`MlinfraError` for all of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.7) -> str:
    """A sentence naming the known word that is closest, or nothing if none is as similar as
    ``cutoff`` (0 to 1)."""
    lowered = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=cutoff)
    return f" Did you mean {lowered[close[0]]!r}?" if close else ""


class MlinfraError(Exception):
    """Base of all errors of this product.

    ``hint`` is one sentence that says what to do next; it is shown after the message.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback: our own frames help no user."""
        lines = [f"\x1b[31m{type(self).__name__}\x1b[39m: {self.message}"]
        return [*lines, self.hint] if self.hint else lines


class RequestError(MlinfraError, ValueError):
    """A request that is malformed or cannot be met: names key, value and what is accepted."""


class ProviderError(MlinfraError):
    """A provider could not do what was asked (credentials, capacity, a failed launch)."""


class NoCapacity(ProviderError):
    """The provider has no such machine free right now; another one may."""


class NotConfirmed(MlinfraError):
    """A machine was not started: the user said no to what it costs, or could not be asked."""


class BudgetSpent(MlinfraError):
    """A budget of the user's is used up: a machine or a run was stopped, or not started."""


class WrongGpu(ProviderError):
    """A machine does not have the accelerators that were asked for; it has been stopped."""


class LinkError(MlinfraError, ConnectionError):
    """The connection to a machine's agent failed."""


class LinkClosed(LinkError):
    """The link is closed for good; no further message can pass."""


class ProtocolError(LinkError):
    """The other side sent bytes that are not of the protocol (see docs/protocol.md)."""


class AuthenticationError(LinkError):
    """The other side did not prove that it holds the session secret."""


class VersionMismatch(LinkError):
    """The two sides speak no common protocol version."""


class Lost(MlinfraError):
    """What ran is gone. ``by_accident``: nobody wanted its end, no limit and no user."""

    by_accident = False


class KernelDied(Lost):
    """The remote kernel process ended while it was needed (exit, out of memory, crash)."""


class MachineLost(Lost):
    """The machine has ended while it was needed."""


class RunDetached(MlinfraError):
    """This process follows the run no longer (the connection was lost for too long, or another
    client has taken it over); it goes on and can be brought back."""


class RunCancelled(MlinfraError):
    """The run was taken out of the queue before it began."""


class StateError(MlinfraError, OSError):
    """The directory where this user's state lies cannot be used."""


class StoreError(MlinfraError):
    """The chunk store cannot give or take a chunk."""


class SyncError(MlinfraError):
    """Files could not be kept alike with those of a machine."""


class ChunkMissing(StoreError, KeyError):
    """A chunk that is needed is not in the store."""

    __str__ = MlinfraError.__str__


class ChunkCorrupt(StoreError):
    """A stored chunk does not match its digest; it has been removed and must be fetched again."""


class CheckpointError(StoreError):
    """A checkpoint is damaged, or does not fit what it is to be restored into."""


class NotTransferable(MlinfraError, TypeError):
    """An object that cannot leave its process was used on the other side."""


class RemoteValueLost(MlinfraError, LookupError):
    """A value that lived on a machine only is gone because its kernel or machine is gone."""

    __str__ = MlinfraError.__str__


class RemoteError(MlinfraError):
    """An exception of the remote code whose own type cannot be rebuilt here.

    ``ename``/``evalue`` are the remote type name and text, ``traceback`` its rendered lines.
    """

    def __init__(self, ename: str, evalue: str, traceback: list[str]) -> None:
        super().__init__(evalue)
        self.ename = ename
        self.evalue = evalue
        self.traceback = traceback

    def _render_traceback_(self) -> list[str]:
        return self.traceback or super()._render_traceback_()


class LedgerError(MlinfraError):
    """The ledger cannot be read or written."""


class EnvironmentFailed(MlinfraError):
    """The packages that a cell needs cannot be had on the machine."""


class PackageUnavailable(EnvironmentFailed):
    """No index that the machine asks has packages that fit."""


class IndexUnreachable(PackageUnavailable):
    """The package index could not be asked, or did not give what it has."""


class EnvironmentConflict(EnvironmentFailed):
    """A running kernel would need other versions of packages than it has."""
