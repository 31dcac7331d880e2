"""The table of operations: routing, checking of what comes in, and the OpenAPI document all follow
from it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import msgspec

from mlinfra_sdk.errors import RequestError

from .._version import __version__
from . import messages as t
from .service import NotFound, Service

_REF = "#/components/schemas/{name}"
_PARTS = {"machine": "[0-9a-f]{32}", "run": "[0-9]{1,18}"}
"""What stands in paths for ``{machine}`` and ``{run}``."""


@dataclass(frozen=True)
class Operation:
    """A method on a path below ``/mlinfra/``, and the method of :class:`Service` that does it. Its
    types are those of that method."""

    method: str
    path: str
    act: Callable[..., Awaitable[msgspec.Struct]]

    @property
    def name(self) -> str:
        return self.act.__name__

    @property
    def types(self) -> Mapping[str, Any]:
        """``query``, ``body`` if there is one, and ``return``."""
        return get_type_hints(self.act)

    @property
    def pattern(self) -> str:
        """The path as a regular expression."""
        return re.sub(r"\{\w+\}", "([^/]+)", self.path)

    @property
    def parts(self) -> list[str]:
        """The names of the path's variable parts."""
        return re.findall(r"\{(\w+)\}", self.path)

    def read(
        self, parts: Sequence[str], arguments: Mapping[str, str], body: bytes
    ) -> dict[str, msgspec.Struct]:
        """The parameters but for those of the path, all checked. Raises :class:`RequestError` and
        :class:`NotFound`."""
        kinds = self.types
        for name, value in zip(self.parts, parts, strict=True):
            if re.fullmatch(_PARTS[name], value) is None:
                raise NotFound(f"There is no {name} of that id.")
        try:
            taken = {"query": msgspec.convert(dict(arguments), kinds["query"], strict=False)}
        except msgspec.ValidationError as error:
            raise RequestError(f"The query is not understood: {error}.") from None
        if "body" in kinds:
            try:
                taken["body"] = msgspec.json.decode(body, type=kinds["body"])
            except msgspec.DecodeError as error:
                raise RequestError(f"The body is not understood: {error}.") from None
        return taken


OPERATIONS = (
    Operation("get", "state", Service.state),
    Operation("get", "machines", Service.machines),
    Operation("post", "machines/{machine}/stop", Service.stop),
    Operation("post", "machines/{machine}/extend", Service.extend),
    Operation("get", "runs", Service.runs),
    Operation("post", "runs/{run}/cancel", Service.cancel),
    Operation("get", "runs/{run}/log", Service.log),
    Operation("get", "costs", Service.costs),
    Operation("get", "catalog", Service.catalog),
    Operation("get", "targets", Service.targets),
    Operation("get", "quotes", Service.quotes),
    Operation("get", "settings", Service.settings),
    Operation("patch", "settings", Service.change_settings),
)


def document(base_url: str) -> t.Document:
    """The OpenAPI document of a server at ``base_url``."""
    kinds = [t.Problem, t.State]
    for it in OPERATIONS:
        kinds += [kind for name, kind in it.types.items() if name != "query"]
    _, schemas = msgspec.json.schema_components(kinds, ref_template=_REF)
    paths: dict[str, Any] = {}
    for it in OPERATIONS:
        paths.setdefault(f"/{it.path}", {})[it.method] = _described(it)
    paths["/events"] = {
        "get": {
            "operationId": "events",
            "summary": "The state now and after each change, as server-sent events `state`.",
            "responses": {
                "200": {
                    "description": "`data` is a State in JSON",
                    "content": {"text/event-stream": {"schema": {"type": "string"}}},
                },
                **_problems(),
            },
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "jupyter-mlinfra", "version": __version__},
        "servers": [{"url": f"{base_url}mlinfra"}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "token": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Authorization",
                    "description": "`token TOKEN`, as for Jupyter Server's own API",
                }
            },
        },
    }


def _described(it: Operation) -> dict[str, Any]:
    kinds = it.types
    said: dict[str, Any] = {
        "operationId": it.name,
        "summary": inspect.getdoc(it.act) or "",
        "parameters": [
            {
                "name": part,
                "in": "path",
                "required": True,
                "schema": {"type": "string", "pattern": f"^{_PARTS[part]}$"},
            }
            for part in it.parts
        ]
        + _parameters(kinds["query"]),
        "responses": {
            "200": {
                "description": "Done",
                "content": {"application/json": {"schema": _schema(kinds["return"])}},
            },
            **_problems(),
        },
    }
    if "body" in kinds:
        said["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _schema(kinds["body"])}},
        }
    return said


def _parameters(query: type[msgspec.Struct]) -> list[dict[str, Any]]:
    schema = msgspec.json.schema_components([query])[1]
    fields = next(iter(schema.values())).get("properties", {}) if schema else {}
    return [
        {"name": name, "in": "query", "required": False, "schema": field}
        for name, field in fields.items()
    ]


def _schema(kind: Any) -> Any:
    return msgspec.json.schema_components([kind], ref_template=_REF)[0][0]


def _problems() -> dict[str, Any]:
    body = {"application/json": {"schema": _schema(t.Problem)}}
    return {
        status: {"description": text, "content": body}
        for status, text in (
            ("400", "It is not understood, or cannot be met"),
            ("403", "Not authenticated, or from another site"),
            ("404", "There is no such thing"),
            ("500", "It has failed here"),
            ("502", "A machine or provider has failed, or does not answer"),
        )
    }
