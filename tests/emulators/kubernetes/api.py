"""The API over HTTP: what ``kubectl`` asks for when it makes, shows, enters and deletes pods."""

from __future__ import annotations

import json
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

from emulators.kubernetes.cluster import TOKEN, Cluster
from emulators.kubernetes.exec import serve_exec
from emulators.kubernetes.pods import Pod, now
from emulators.kubernetes.validation import Invalid, check_pod

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_REVIEWS = "authorization.k8s.io"


class Failure(web.HTTPException):
    """An answer of the kind ``Status``."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        self.status_code = code
        body = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "reason": reason,
            "message": message,
            "code": code,
        }
        super().__init__(text=json.dumps(body), content_type="application/json")


class Api:
    """The handlers. ``calls`` counts (verb, resource)."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.calls: Counter[tuple[str, str]] = Counter()

    def application(self) -> web.Application:
        """For aiohttp's server."""
        app = web.Application(middlewares=[self._admit], client_max_size=1 << 20)
        pods = "/api/v1/namespaces/{namespace}/pods"
        app.add_routes(
            [
                web.get("/version{_:/?}", self._version),
                web.get("/api{_:/?}", self._versions),
                web.get("/apis{_:/?}", self._groups),
                web.get("/api/v1", self._core),
                web.get(f"/apis/{_REVIEWS}/v1", self._review_resources),
                web.post(f"/apis/{_REVIEWS}/v1/selfsubjectaccessreviews", self._review),
                web.get("/api/v1/nodes", self._nodes),
                web.get(pods, self._list),
                web.post(pods, self._create),
                web.get(f"{pods}/{{name}}", self._get),
                web.delete(f"{pods}/{{name}}", self._delete),
                web.get(f"{pods}/{{name}}/exec", self._exec),
                web.get("/api/v1/namespaces/{namespace}/events", self._events),
            ]
        )
        return app

    @web.middleware
    async def _admit(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        if self._cluster.faults.down:
            raise Failure(503, "ServiceUnavailable", "the server is currently unable to answer")
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Failure(401, "Unauthorized", "Unauthorized")
        return await handler(request)

    def _may(self, request: web.Request, verb: str, resource: str) -> str:
        """Refuse what this user may not do, and namespaces that are not there; gives the
        namespace."""
        self.calls[verb, resource] += 1
        namespace = request.match_info.get("namespace", "")
        if (verb, resource) in self._cluster.faults.forbidden:
            where = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
            raise Failure(
                403,
                "Forbidden",
                f'{resource} is forbidden: User "tester" cannot {verb} resource "{resource}" '
                f'in API group "" {where}',
            )
        if verb == "create" and namespace not in self._cluster.namespaces:
            raise Failure(404, "NotFound", f'namespaces "{namespace}" not found')
        return namespace

    def _pod(self, request: web.Request, verb: str, resource: str = "pods") -> Pod:
        namespace = self._may(request, verb, resource)
        name = request.match_info["name"]
        pod = self._cluster.pods.get((namespace, name))
        if pod is None:
            raise Failure(404, "NotFound", f'pods "{name}" not found')
        return pod

    async def _get(self, request: web.Request) -> web.Response:
        return web.json_response(self._pod(request, "get").as_json())

    async def _list(self, request: web.Request) -> web.Response:
        namespace = self._may(request, "list", "pods")
        wanted = _pairs(request.query.get("labelSelector", ""))
        found = [
            pod.as_json()
            for (place, _), pod in self._cluster.pods.items()
            if place == namespace and wanted.items() <= pod.metadata.get("labels", {}).items()
        ]
        return web.json_response({"kind": "PodList", "apiVersion": "v1", "items": found})

    async def _create(self, request: web.Request) -> web.Response:
        namespace = self._may(request, "create", "pods")
        if request.query.get("fieldValidation") != "Strict":
            raise Failure(400, "BadRequest", "the emulator wants fieldValidation=Strict")
        definition = await request.json()
        try:
            check_pod(definition)
        except Invalid as error:
            name = definition.get("metadata", {}).get("name")
            raise Failure(422, "Invalid", f'Pod "{name}" is invalid: {error}') from None
        pod = Pod(namespace, definition, self._cluster.folder)
        if (namespace, pod.name) in self._cluster.pods:
            raise Failure(409, "AlreadyExists", f'pods "{pod.name}" already exists')
        self._cluster.add(pod)
        return web.json_response(pod.as_json(), status=201)

    async def _delete(self, request: web.Request) -> web.Response:
        pod = self._pod(request, "delete")
        grace = request.query.get("gracePeriodSeconds")
        pod.grace = float(grace or pod.spec.get("terminationGracePeriodSeconds", 30))
        pod.metadata["deletionTimestamp"] = now()
        pod.deleted.set()
        return web.json_response(pod.as_json())

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        pod = self._pod(request, "create", "pods/exec")
        if not pod.running:
            raise Failure(400, "BadRequest", f"pod {pod.name} does not have a running container")
        if request.query.get("container") not in (None, pod.only["name"]):
            raise Failure(400, "BadRequest", "container not found in pod")
        return await serve_exec(request, pod)

    async def _events(self, request: web.Request) -> web.Response:
        self._may(request, "list", "events")
        wanted = _pairs(request.query.get("fieldSelector", ""))
        found = [
            event
            for pod in self._cluster.pods.values()
            for event in pod.events
            if pod.name == wanted["involvedObject.name"]
        ]
        return web.json_response({"kind": "EventList", "apiVersion": "v1", "items": found})

    async def _nodes(self, request: web.Request) -> web.Response:
        self._may(request, "list", "nodes")
        nodes = [node.as_json() for node in self._cluster.nodes]
        return web.json_response({"kind": "NodeList", "apiVersion": "v1", "items": nodes})

    async def _review(self, request: web.Request) -> web.Response:
        review = await request.json()
        asked = review["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
        refused = (asked["verb"], resource) in self._cluster.faults.forbidden
        return web.json_response({**review, "status": {"allowed": not refused}}, status=201)

    # -- discovery -----------------------------------------------------------------------------

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"major": "1", "minor": "34", "gitVersion": "v1.34.0"})

    async def _versions(self, request: web.Request) -> web.Response:
        return web.json_response({"kind": "APIVersions", "versions": ["v1"]})

    async def _groups(self, request: web.Request) -> web.Response:
        version = {"groupVersion": f"{_REVIEWS}/v1", "version": "v1"}
        group = {"name": _REVIEWS, "versions": [version], "preferredVersion": version}
        return web.json_response({"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]})

    async def _core(self, request: web.Request) -> web.Response:
        pods = _resource("pods", "Pod", ["create", "delete", "get", "list"])
        pods |= {"shortNames": ["po"], "singularName": "pod"}
        nodes = _resource("nodes", "Node", ["list"])
        nodes |= {"namespaced": False, "singularName": "node"}
        execs = _resource("pods/exec", "PodExecOptions", ["create", "get"])
        return _resources("v1", [pods, nodes, execs])

    async def _review_resources(self, request: web.Request) -> web.Response:
        reviews = _resource("selfsubjectaccessreviews", "SelfSubjectAccessReview", ["create"])
        return _resources(f"{_REVIEWS}/v1", [{**reviews, "namespaced": False}])


def _resource(name: str, kind: str, verbs: list[str]) -> dict[str, Any]:
    return {"name": name, "singularName": "", "namespaced": True, "kind": kind, "verbs": verbs}


def _resources(version: str, resources: list[dict[str, Any]]) -> web.Response:
    body = {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
    return web.json_response(body)


def _pairs(selector: str) -> Mapping[str, str]:
    return dict(pair.split("=", 1) for pair in selector.split(",") if pair)


async def serve(api: Api, context: ssl.SSLContext) -> tuple[web.AppRunner, int]:
    """Start to listen on loopback; gives the port."""
    runner = web.AppRunner(api.application(), shutdown_timeout=1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    return runner, runner.addresses[0][1]
