"""The user's ``kubectl``, with its configuration and its plug-ins for logging in."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import msgspec

from mlinfra_sdk.errors import LinkError, MlinfraError, ProviderError

_TIMEOUT = "--request-timeout=15s"
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_UNREACHABLE = (
    "was refused|Unable to connect|i/o timeout|timed out|no such host|ServiceUnavailable|EOF|"
    "connection reset|TLS handshake|deadline exceeded|TooManyRequests|InternalError"
)
_FAULTS = (
    (
        "context .* does not exist|cannot locate context",
        "there is no such context in kubectl's configuration",
        "`kubectl config get-contexts` lists them.",
    ),
    (
        r"executable .* not found|getting credentials",
        "the plug-in that logs in to it failed",
        "Install it as your cluster's documentation says, and try: kubectl get pods",
    ),
    (
        "x509|certificate",
        "its certificate is not trusted",
        "Get kubectl's configuration for it anew, and try: kubectl get pods",
    ),
    (
        "Unauthorized|must be logged in",
        "it does not accept your credentials",
        "Log in again as your cluster's documentation says, and try: kubectl get pods",
    ),
    (
        r"exceeded quota|\(Forbidden\)",
        "it refuses",
        "Ask who runs the cluster, or name another namespace in the target.",
    ),
    (
        r"namespaces? .* not found",
        "there is no such namespace",
        "Name one by namespace= of the target: kubectl get namespaces",
    ),
    (
        "is invalid|BadRequest|cannot be handled",
        "it does not take such a pod",
        "Check the options of the target.",
    ),
)


class Missing(ProviderError):
    """There is no such object."""


class Exists(ProviderError):
    """There is one of this name already."""


class Place(msgspec.Struct, frozen=True):
    """A context of the user's configuration and a namespace; no context is the cluster in which
    this process itself runs in a pod."""

    context: str
    namespace: str

    def __str__(self) -> str:
        return f"kubernetes:{self.context}" if self.context else "kubernetes"

    def command(self, *words: str) -> list[str]:
        """A command line of ``kubectl``."""
        context = [f"--context={self.context}"] if self.context else []
        return ["kubectl", *context, f"--namespace={self.namespace}", *words]

    def fault(self, complaint: str) -> MlinfraError:
        """What kubectl complained of, and what to do. A :class:`LinkError` if the cluster may just
        not be reachable now."""
        lines = [it for it in complaint.strip().splitlines() if not re.match(r"[EWI]\d{4} ", it)]
        said = " ".join(lines).removeprefix("error: ").removeprefix("Error from server ")[-800:]
        for pattern, what, hint in _FAULTS:
            if re.search(pattern, complaint):
                return ProviderError(f"on={self}: {what}: {said.rstrip('.')}.", hint=hint)
        if re.search(_UNREACHABLE, complaint):
            return LinkError(
                f"on={self} cannot be reached: {said.rstrip('.')}.", hint="Try: kubectl get pods"
            )
        return ProviderError(f"on={self}: kubectl failed: {said}", hint="Try: kubectl get pods")

    async def get(self, path: str, cluster: bool = False) -> Any:
        """An object of the namespace, or of the whole ``cluster``, or a list of them."""
        return await self._raw("get", path, cluster=cluster)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Make an object."""
        return await self._raw("create", path, "-f", "-", body=body)

    async def delete(self, path: str) -> None:
        """Begin to delete an object."""
        await self._raw("delete", path)

    async def _raw(
        self, verb: str, path: str, *more: str, body: Any = None, cluster: bool = False
    ) -> Any:
        base = "/api/v1" if cluster else f"/api/v1/namespaces/{self.namespace}"
        return await self.api(verb, f"{base}/{path}", *more, body=body)

    async def api(self, verb: str, path: str, *more: str, body: Any = None) -> Any:
        """One request by its full path: the API itself, which needs no discovery first. Raises
        :class:`LinkError`, or :class:`ProviderError` for what will not get better."""
        command = self.command(_TIMEOUT, verb, "--raw", path, *more)
        status, out, err = await _run(command, json.dumps(body).encode() if body else b"")
        if status == 0:
            return json.loads(out)
        if "AlreadyExists" in err:
            raise Exists(err)
        fault = self.fault(err)
        if "(NotFound)" in err and "namespace" not in err:
            raise Missing(fault.message)
        raise fault


async def place(context: str, namespace: str) -> Place:
    """The context and the namespace that the user means, by name: they may change later.

    Raises :class:`ProviderError` if there is no cluster to talk to."""
    chosen = [f"--context={context}"] if context else []
    command = ["kubectl", *chosen, "config", "view", "--minify", "--output=json"]
    status, out, err = await _run(command)
    if status:
        if not context and os.environ.get("KUBERNETES_SERVICE_HOST"):
            own = _SERVICE_ACCOUNT.read_text() if _SERVICE_ACCOUNT.exists() else "default"
            return Place("", namespace or own)
        if not context:
            raise ProviderError(
                "on=kubernetes has no cluster: kubectl's configuration names none.",
                hint="Get it from your cluster's provider, or write on=kubernetes:CONTEXT.",
            )
        raise Place(context, namespace).fault(err)
    config = json.loads(out)
    found = config["contexts"][0]
    own = found["context"].get("namespace", "default")
    return Place(found["name"], namespace or own)


async def _run(command: Sequence[str], data: bytes = b"") -> tuple[int, str, str]:
    try:
        done = await anyio.run_process(command, input=data, check=False, start_new_session=True)
    except FileNotFoundError:
        raise ProviderError(
            "There is no kubectl here.", hint="https://kubernetes.io/docs/tasks/tools/"
        ) from None
    return done.returncode, done.stdout.decode(), done.stderr.decode("utf-8", "replace")
