"""What Colab's control plane knows of an account: its runtimes, and the compute units left.

It is asked through Google's own client (``helper.py``), whose tokens stay in this process.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec

from mlinfra_sdk.errors import LinkClosed, ProviderError
from mlinfra_sdk.providers import tools

CLIENT = "0.7.5"
"""The version of google-colab-cli whose inner interface is used; it changes between minor ones."""
LOG_IN = (
    f"Run: uvx --from google-colab-cli=={CLIENT} colab --auth oauth2 usage "
    "(it opens a page, and asks for the code that is shown there)."
)
ADDRESS = "MLINFRA_COLAB_URL"
"""The environment variable that names another control plane, for tests."""

_TOOL = tools.Tool(
    "colab", (f"google-colab-cli=={CLIENT}",), (3, 12), Path(__file__).with_name("helper.py")
)
_NOTEBOOKS = uuid.UUID("7b4c1b5e-8f5a-4b39-9a53-0a3f0f6f5c11")
_MARGIN = 300.0
"""Seconds before its end in which a token is replaced: Google's client does so, too."""
_ENVIRONMENT = {"COLAB_CLI_REQUEST_TIMEOUT": "120", "COLAB_CLI_ASSIGN_RETRIES": "1"}


class Runtime(msgspec.Struct, frozen=True):
    """A machine that is assigned to the account. ``url`` and ``token`` lead to its Jupyter Server
    for ``expires`` seconds; ``accelerator`` is what it really has."""

    endpoint: str
    accelerator: str
    url: str
    token: str
    expires: int


class Usage(msgspec.Struct, frozen=True):
    """Compute units: what is left of those that were paid for, and what is used in an hour by all
    runtimes that are assigned now."""

    balance: float
    rate: float
    assignments: int

    def __str__(self) -> str:
        using = f", of which {self.rate:.2f} are used in an hour now" if self.assignments else ""
        return f"{self.balance:.2f} compute units are left{using}"


class _Assigned(msgspec.Struct, frozen=True):
    runtimes: list[Runtime]
    usage: Usage


class _Access(msgspec.Struct, frozen=True):
    url: str
    token: str
    until: float


_open: dict[str, _Access] = {}
"""By endpoint; never written to a disk."""


def login() -> str:
    """How Google's client can log in here, ``oauth2`` or ``adc``; empty if it cannot."""
    if _token_file().exists():
        return "oauth2"
    default = Path(os.environ.get("CLOUDSDK_CONFIG") or Path.home() / ".config" / "gcloud")
    if (
        os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
        or (default / "application_default_credentials.json").exists()
    ):
        return "adc"
    return ""


def _token_file() -> Path:
    return Path.home() / ".config" / "colab-cli" / "token.json"


class Account:
    """Who asks: ``auth`` is how the client logs in (empty: as :func:`login` finds)."""

    def __init__(self, auth: str = "") -> None:
        self.auth = auth

    async def assign(
        self, key: str, variant: str, accelerator: str, high_memory: bool
    ) -> tuple[Runtime, Usage]:
        """The runtime of this key, which is made if there is none, and what the account uses then.
        Raises :class:`mlinfra_sdk.errors.NoCapacity`. Not to be cancelled: see
        :func:`tools.ask`."""
        given = await self._ask(
            "assign",
            _Assigned,
            notebook=_notebook(key),
            variant=variant,
            accelerator=accelerator,
            high_memory=high_memory,
        )
        if not given.runtimes:
            raise ProviderError("Colab took the machine back at once.", hint="Try again.")
        return _remember(given.runtimes[0]), given.usage

    async def find(self, key: str) -> str:
        """The endpoint of the runtime of this key; empty if there is none."""
        endpoint: str = await self._ask("find", str, notebook=_notebook(key))
        return endpoint

    async def runtimes(self) -> dict[str, Runtime]:
        """All runtimes of the account by endpoint, also those that others have made."""
        found = await self._ask("list", list[Runtime])
        return {runtime.endpoint: _remember(runtime) for runtime in found}

    async def unassign(self, endpoint: str) -> None:
        """Give a runtime back; one that is gone already is no error. Raises
        :class:`ProviderError` if Colab goes on listing it."""
        _open.pop(endpoint, None)
        if not await self._ask("unassign", bool, endpoint=endpoint):
            raise ProviderError(
                f"Colab has been asked to end {endpoint}, but still lists it.",
                hint="Look at https://colab.research.google.com (Runtime, Manage sessions).",
            )

    async def usage(self) -> Usage:
        """Compute units of the account."""
        usage: Usage = await self._ask("usage", Usage)
        return usage

    async def access(self, endpoint: str, *, fresh: bool = False) -> tuple[str, str]:
        """URL and token of a runtime's Jupyter Server, asked for again before the token ends.
        Raises :class:`LinkClosed` if the runtime is gone."""
        known = _open.get(endpoint)
        if fresh or known is None or known.until < time.monotonic():
            if endpoint not in await self.runtimes():
                _open.pop(endpoint, None)
                raise LinkClosed(
                    "The machine has ended: Colab has taken it back, or it was ended elsewhere.",
                    hint="The next cell starts a new one.",
                )
            known = _open[endpoint]
        return known.url, known.token

    async def _ask(self, call: str, kind: Any, **values: Any) -> Any:
        auth = self.auth or login()
        if not auth:
            raise ProviderError("There is no login for Colab here.", hint=LOG_IN)
        if auth == "oauth2" and not _token_file().exists():
            # Without it the client would ask for a code, and nobody could answer.
            raise ProviderError(f"There is no login for Colab in {_token_file()}.", hint=LOG_IN)
        request = {
            "call": call,
            "auth": auth,
            "domain": os.environ.get(ADDRESS, ""),
            "version": CLIENT,
            **values,
        }
        try:
            return msgspec.convert(await tools.ask(_TOOL, request, _ENVIRONMENT), kind)
        except msgspec.ValidationError as error:
            raise ProviderError(f"Colab did not answer {call} as expected: {error}.") from None


def _notebook(key: str) -> str:
    """Colab gives the same runtime to whoever asks for the same notebook."""
    return str(uuid.uuid5(_NOTEBOOKS, key))


def _remember(runtime: Runtime) -> Runtime:
    until = time.monotonic() + max(runtime.expires - _MARGIN, 0.0)
    _open[runtime.endpoint] = _Access(runtime.url, runtime.token, until)
    return runtime
