"""Between Tornado and the operations: authentication, errors, and the stream of events."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import msgspec
from jupyter_server.auth.decorator import authorized
from jupyter_server.base.handlers import APIHandler
from jupyter_server.utils import url_path_join
from tornado import web
from tornado.iostream import StreamClosedError

from mlinfra_sdk.errors import LinkError, MlinfraError, ProviderError, RequestError

from .config import FieldError
from .messages import Problem
from .operations import OPERATIONS, Operation, document
from .service import NotFound, Service
from .watcher import Watcher

Rule = tuple[str, type[web.RequestHandler], dict[str, Any]]

_STATUS: tuple[tuple[type[MlinfraError], int], ...] = (
    (RequestError, 400),
    (NotFound, 404),
    (LinkError, 502),
    (ProviderError, 502),
    (MlinfraError, 500),
)


def handlers(service: Service, watcher: Watcher) -> list[Rule]:
    """Everything below ``/mlinfra``."""
    by_pattern: dict[str, dict[str, Operation]] = {}
    for operation in OPERATIONS:
        by_pattern.setdefault(operation.pattern, {})[operation.method] = operation
    rules: list[Rule] = [
        (url_path_join("mlinfra", pattern), OperationHandler, {"service": service, "by": by})
        for pattern, by in by_pattern.items()
    ]
    return [
        *rules,
        (url_path_join("mlinfra", "events"), EventsHandler, {"watcher": watcher}),
        (url_path_join("mlinfra", "openapi.json"), DocumentHandler, {}),
    ]


class _Handler(APIHandler):
    """Answers JSON, errors too; needs an authenticated user who may use ``mlinfra``."""

    auth_resource = "mlinfra"
    _track_activity = False  # a page that looks on must not keep an idle server alive

    async def prepare(self) -> None:  # type: ignore[override]
        """Refuse what another site has a logged-in browser ask; methods that act have Jupyter's own
        protection against that already."""
        await super().prepare()
        site = self.request.headers.get("Sec-Fetch-Site", "none")
        if site == "cross-site" and not self.token_authenticated:
            raise web.HTTPError(403, "This comes from another site.")

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Errors as a :class:`Problem`."""
        if status_code == 405:
            self.set_header("Allow", ", ".join(self.SUPPORTED_METHODS))
        error = (kwargs.get("exc_info") or (None, None))[1]
        text = error.log_message if isinstance(error, web.HTTPError) else None
        message = (text or self._reason).replace("%%", "%")
        self.finish(msgspec.json.encode(Problem(message)))

    def refuse(self, error: MlinfraError) -> None:
        """Answer with an error of ours."""
        self.set_status(next(status for kind, status in _STATUS if isinstance(error, kind)))
        field = error.field if isinstance(error, FieldError) else ""
        self.finish(msgspec.json.encode(Problem(error.message, error.hint, field)))


class OperationHandler(_Handler):
    """One path and its methods."""

    def initialize(self, service: Service, by: dict[str, Operation]) -> None:
        """Called by Tornado."""
        self._service = service
        self._by = by
        self.SUPPORTED_METHODS = ("OPTIONS", *(method.upper() for method in by))

    @web.authenticated
    @authorized
    async def get(self, *parts: str) -> None:
        """Carry out what the table says."""
        await self._do("get", parts)

    @web.authenticated
    @authorized
    async def post(self, *parts: str) -> None:
        """Carry out what the table says."""
        await self._do("post", parts)

    @web.authenticated
    @authorized
    async def patch(self, *parts: str) -> None:
        """Carry out what the table says."""
        await self._do("patch", parts)

    async def _do(self, method: str, parts: tuple[str, ...]) -> None:
        operation = self._by[method]
        try:
            arguments = {key: self.get_query_argument(key) for key in self.request.query_arguments}
            taken = operation.read(parts, arguments, self.request.body)
            reply = await operation.act(self._service, *parts, **taken)
        except MlinfraError as error:
            self.refuse(error)
        else:
            self.finish(msgspec.json.encode(reply))


class EventsHandler(_Handler):
    """The state, as server-sent events, until the page goes away."""

    def initialize(self, watcher: Watcher) -> None:
        """Called by Tornado."""
        self._watcher = watcher

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """Stream."""
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("Cache-Control", "no-cache")
        self.set_header("X-Accel-Buffering", "no")  # proxies must not wait for more
        events = self._watcher.events()
        try:
            await self._send(b": jupyter-mlinfra\n\n")
            async for state in events:
                await self._send(b"event: state\ndata: %s\n\n" % state if state else b":\n\n")
        except StreamClosedError:
            pass
        finally:
            await events.aclose()

    def _send(self, data: bytes) -> Awaitable[None]:
        self.write(data)
        return self.flush()

    def on_connection_close(self) -> None:
        """The page has gone; the next event finds that out."""


class DocumentHandler(_Handler):
    """What can be asked, for programs."""

    @web.authenticated
    @authorized
    async def get(self) -> None:
        """The OpenAPI document."""
        self.finish(msgspec.json.encode(document(self.base_url)))
