"""Modal's errors as ours: what is wrong, and what to do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from mlinfra_sdk.errors import LinkError, MlinfraError, NoCapacity, ProviderError

INSTALL = 'Run: pip install "mlinfra-sdk[modal]"'
LOG_IN = "Run: modal token new (it opens a browser), then restart this kernel."


def missing() -> ProviderError | None:
    """The error for an absent package."""
    if find_spec("modal") is not None:
        return None
    return ProviderError("on=modal needs the package modal, which is not installed.", hint=INSTALL)


def has_token() -> bool:
    """Whether there is anything that the client could log in with; without importing it."""
    if any(name.startswith(("MODAL_TOKEN_ID", "MODAL_OAUTH_")) for name in os.environ):
        return True
    return Path(os.environ.get("MODAL_CONFIG_PATH") or "~/.modal.toml").expanduser().exists()


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise errors of Modal's client as :class:`ProviderError`, or as :class:`LinkError` when it
    could not reach the service."""
    absent = missing()
    if absent is not None:
        raise absent
    import modal.exception

    try:
        yield
    except modal.exception.Error as error:
        raise translate(error) from error
    except OSError as error:
        if isinstance(error, MlinfraError):
            raise
        raise unreachable(error) from error


def unreachable(error: BaseException) -> LinkError:
    """The service does not answer."""
    text = str(error).rstrip(".") or type(error).__name__
    return LinkError(
        f"Modal cannot be reached: {text}.",
        hint="Check the network and https://status.modal.com, then try again.",
    )


def translate(error: Exception) -> MlinfraError:
    """The error of ours that says what one of the client's means."""
    from modal import exception as theirs

    text = str(error).strip().rstrip(".")
    match error:
        case theirs.AuthError() | theirs.PermissionDeniedError():
            return ProviderError(f"Modal does not let you in: {text}.", hint=LOG_IN)
        case theirs.ResourceExhaustedError():
            return NoCapacity(
                f"Modal has no machine for you now: {text}.",
                hint="Try again later, take another GPU (gpu=A10|L4|T4), or raise the limit of "
                "your workspace at https://modal.com/settings.",
            )
        case theirs.ImageBuildError():
            return ProviderError(f"Modal could not build the machine's image. {text}.")
        case theirs.ConnectionError() | theirs.ServiceError() | theirs.InternalError():
            return unreachable(error)
        case theirs.VersionError():
            return ProviderError(f"Modal refuses this version of its client: {text}.", hint=INSTALL)
        case _:
            return ProviderError(f"Modal refused: {text or type(error).__name__}.")
