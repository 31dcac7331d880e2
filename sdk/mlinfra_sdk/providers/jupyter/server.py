"""A Jupyter Server's REST interface: its address, who we are there, and what its answers mean."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from functools import cached_property
from typing import Any, NoReturn
from urllib.parse import urlsplit, urlunsplit

import httpx
import msgspec

from mlinfra_sdk.errors import LinkError, MlinfraError, ProviderError, RequestError

_ANSWER_WITHIN = 30.0
_PAGES = ("lab", "tree", "notebooks", "doc")
_OWN_MACHINE = ("localhost", "127.0.0.1", "::1")


class KernelGone(ProviderError):
    """A kernel that the server does not know any more."""


class Server:
    """One server. ``token`` is asked for with every request, so that a new one is taken up."""

    def __init__(
        self,
        url: str,
        token: Callable[[], Awaitable[str]],
        *,
        plain_http: bool = False,
        header: str = "Authorization",
        scheme: str = "token ",
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme == "http" and parts.hostname not in _OWN_MACHINE and not plain_http:
            raise RequestError(
                f"{url} is not encrypted: your token could be read on the way.",
                hint="Use https://, or an ssh tunnel to 127.0.0.1; in a network that you trust "
                "set `plain_http = true` in the target.",
            )
        self.url = url.rstrip("/") + "/"
        self._token = token
        self._header, self._scheme = header, scheme

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """Verifies with the system's authorities, or those of SSL_CERT_FILE."""
        return ssl.create_default_context()

    async def headers(self) -> dict[str, str]:
        """What proves who we are."""
        token = await self._token()
        return {self._header: self._scheme + token} if token else {}

    def websocket_url(self, path: str) -> str:
        """The address of a websocket."""
        return "ws" + self.url.removeprefix("http") + path

    async def ask(self, method: str, path: str, body: Any = None, within: float = 0.0) -> Any:
        """Send a request; the decoded answer, or an error that says what it means."""
        content = None if body is None else msgspec.json.encode(body)
        headers = await self.headers() | {"Accept": "application/json"}
        if content is not None:
            headers["Content-Type"] = "application/json"
        try:
            async with httpx.AsyncClient(
                verify=self.tls if self.url.startswith("https:") else False,
                timeout=within or _ANSWER_WITHIN,
            ) as client:
                answer = await client.request(
                    method, self.url + path, content=content, headers=headers
                )
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise self.unreachable(error) from None
        if not answer.is_success:
            raise refusal(self, answer.status_code, path)
        if answer.status_code == 204:
            return None
        try:
            return msgspec.json.decode(answer.content)
        except msgspec.DecodeError:
            self._no_jupyter(path)

    def unreachable(self, error: Exception) -> LinkError:
        """The error for a request that got no answer."""
        reason = str(error) or type(error).__name__
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            return LinkError(
                f"The certificate of {self.url} cannot be verified: {reason}",
                hint="Name the authority that has signed it by SSL_CERT_FILE.",
            )
        return LinkError(
            f"The Jupyter Server at {self.url} does not answer: {reason}.",
            hint="Check the URL, and whether the server runs.",
        )

    def _no_jupyter(self, path: str) -> NoReturn:
        raise ProviderError(
            f"{self.url} is not a Jupyter Server: its answer to {path} is not JSON.",
            hint="The URL is what stands before /lab or /tree in the browser, with the base_url.",
        )


def refusal(server: Server, status: int, what: str) -> MlinfraError:
    """The error for an answer with this status."""
    where = f"The Jupyter Server at {server.url}"
    if 300 <= status < 400 or status in (401, 403):  # a redirection goes to a login page
        return ProviderError(
            f"{where} refuses the token (HTTP {status}).",
            hint="It may have expired or been changed: `jupyter server list` shows a server's own, "
            "a hub's come from its page Token. `mlinfra doctor` says where it is looked for.",
        )
    if status == 404 and what.startswith(("api/kernels/", "api/sessions/")):
        return KernelGone(f"{where} does not know the kernel any more (HTTP {status}).")
    if status == 404:
        return ProviderError(
            f"There is no Jupyter Server at {server.url} (HTTP 404 for {what}).",
            hint="The URL is what stands before /lab or /tree in the browser, with the base_url.",
        )
    if status in (424, 502, 503, 504):
        return LinkError(
            f"{where} does not run (HTTP {status}).",
            hint="Start it, on a JupyterHub from its home page.",
        )
    return ProviderError(
        f"{where} answered HTTP {status} to {what}.",
        hint="Its own log says why.",
    )


def server_url(address: str) -> str:
    """The server's own URL, of an address as it is copied from a browser or a log."""
    parts = urlsplit(address if "://" in address else f"https://{address}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RequestError(
            "The URL of a Jupyter Server must begin with https:// or http://.",
            hint="Copy it from the browser.",
        )
    if parts.username or parts.password:
        raise RequestError(
            "A user name or a password in the URL of a Jupyter Server is of no use.",
            hint="Give the server's token.",
        )
    segments = parts.path.rstrip("/").split("/")
    for page in _PAGES:
        if page in segments:
            segments = segments[: segments.index(page)]
    return urlunsplit((parts.scheme, parts.netloc, "/".join(segments) + "/", "", ""))
