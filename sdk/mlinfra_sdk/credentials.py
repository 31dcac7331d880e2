"""Where a provider's secrets come from: never from a cell, a settings file or the ledger.

A settings file names the place: ``token = "env:NAME"``, ``"file:PATH"`` or
``"keyring:SERVICE/USER"``. A secret that comes with an address, as one copies it from a browser,
is taken out of it and kept in this process only.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from .errors import ProviderError, RequestError

_SECRET = "token"
_SCHEMES = ("env", "file", "keyring")

_apart: dict[str, str] = {}


def take_apart(address: str) -> tuple[str, str]:
    """An address without the ``token=`` of its query, and the token; empty if there is none."""
    parts = urlsplit(address)
    query = parse_qsl(parts.query, keep_blank_values=True)
    token = next((value for name, value in query if name == _SECRET), "")
    if not token:
        return address, ""
    rest = urlencode([pair for pair in query if pair[0] != _SECRET])
    return urlunsplit(parts._replace(query=rest)), token


def keep_apart(address: str) -> str:
    """The address without its token, which :func:`kept` gives to this process."""
    bare, token = take_apart(address)
    if token:
        _apart[bare] = token
    return bare


def kept(address: str) -> str:
    """The token that was taken out of this address; empty if there was none."""
    return _apart.get(address, "")


def check_reference(reference: str, where: str) -> None:
    """Raise :class:`RequestError` unless this names a place. It may be the secret itself, so the
    message does not repeat it."""
    scheme, colon, rest = reference.partition(":")
    if scheme not in _SCHEMES or not colon or not rest:
        raise RequestError(
            f"{where} must say where the secret is, and not the secret itself.",
            hint="Write env:NAME, file:PATH or keyring:SERVICE/USER.",
        )


def fetch(reference: str) -> str:
    """The secret from the place that is named. Raises :class:`ProviderError` if it is not there."""
    scheme, _, rest = reference.partition(":")
    if scheme == "env":
        secret = os.environ.get(rest, "")
        missing = f"The environment variable {rest} is not set."
    elif scheme == "file":
        try:
            secret = Path(rest).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ProviderError(f"The secret in {rest} cannot be read: {error}.") from None
        missing = f"The file {rest} is empty."
    else:
        service, _, user = rest.partition("/")
        secret = from_keyring(service, user)
        missing = f"The keyring has no secret for {user} of {service}."
    if not secret:
        raise ProviderError(missing, hint=f"It is looked for because of token = {reference!r}.")
    return secret


def from_keyring(service: str, user: str, *, needed: bool = True) -> str:
    """A secret of the system's keyring; empty if it has none."""
    try:
        import keyring
        import keyring.errors
    except ModuleNotFoundError:
        if not needed:
            return ""
        raise ProviderError(
            "The package keyring is not installed.", hint="pip install keyring"
        ) from None
    try:
        return keyring.get_password(service, user) or ""
    except keyring.errors.KeyringError as error:
        if not needed:
            return ""
        raise ProviderError(
            f"The keyring cannot be used: {error}.", hint="Unlock it, or use env: or file:."
        ) from None
