"""The emulator in a thread of its own, so that clients may block."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import ssl
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import trustme

from emulators.kubernetes.api import Api, serve
from emulators.kubernetes.cluster import TOKEN, Cluster, Faults
from emulators.kubernetes.pods import Pod

T = TypeVar("T")


class Emulator:
    """What a test holds. All methods may be called from any thread but the emulator's own."""

    def __init__(self, cluster: Cluster, api: Api, url: str, authority: bytes) -> None:
        self._cluster = cluster
        self._api = api
        self._loop = asyncio.get_running_loop()
        self._server = {
            "server": url,
            "certificate-authority-data": base64.b64encode(authority).decode(),
        }

    @property
    def calls(self) -> Counter[tuple[str, str]]:
        """How often each (verb, resource) was asked for."""
        return self._api.calls

    @property
    def faults(self) -> Faults:
        """What goes wrong from now on."""
        return self._cluster.faults

    def heal(self) -> None:
        """Switch all faults off."""
        pulling = self._cluster.faults.pulling
        self._cluster.faults = Faults()
        if pulling is not None:
            self._loop.call_soon_threadsafe(pulling.set)

    def hold_images(self) -> None:
        """No image is there until :meth:`heal`."""
        self._cluster.faults.pulling = asyncio.Event()

    def kubeconfig(self, path: Path, *, token: str = TOKEN, namespace: str = "ml") -> Path:
        """Write a user's configuration with the contexts ``test`` (the current one), whose
        credentials come from a plug-in as clouds have it, and ``elsewhere``, where nobody
        listens."""
        credential = {
            "apiVersion": "client.authentication.k8s.io/v1",
            "kind": "ExecCredential",
            "status": {"token": token},
        }
        plugin = path.with_name("auth-plugin")
        plugin.write_text(f"#!/bin/sh\necho '{json.dumps(credential)}'\n")
        plugin.chmod(0o755)
        user = {
            "exec": {
                "apiVersion": "client.authentication.k8s.io/v1",
                "command": str(plugin),
                "interactiveMode": "Never",
            }
        }
        context = {"cluster": "test", "user": "tester", "namespace": namespace}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [
                {"name": "test", "cluster": self._server},
                {"name": "elsewhere", "cluster": {"server": "https://127.0.0.1:1"}},
            ],
            "users": [{"name": "tester", "user": user}],
            "contexts": [
                {"name": "test", "context": context},
                {"name": "elsewhere", "context": {"cluster": "elsewhere", "user": "tester"}},
            ],
        }
        path.write_text(json.dumps(config))  # JSON is YAML
        path.chmod(0o600)
        return path

    def pods(self) -> list[Pod]:
        """Pods that have not ended, the newest last."""
        return [pod for pod in list(self._cluster.pods.values()) if not pod.ended]

    def objects(self) -> list[str]:
        """Names of all pods, also of those that have ended."""
        return [pod.name for pod in list(self._cluster.pods.values())]

    def evict(self, pod: Pod) -> None:
        """Its node runs out of memory."""
        text = "The node was low on resource: memory."
        self._do(lambda: pod.end("Failed", "Evicted", text))

    def preempt(self, pod: Pod) -> None:
        """A pod of higher priority takes its place."""

        def preempt() -> None:
            text = "preempted by a pod of higher priority"
            pod.condition("DisruptionTarget", True, "PreemptionByScheduler", text)
            pod.deleted.set()

        self._do(preempt)

    def _do(self, work: Callable[[], T]) -> T:
        async def do() -> T:
            return work()

        return asyncio.run_coroutine_threadsafe(do(), self._loop).result()


@contextmanager
def emulator() -> Iterator[Emulator]:
    """A cluster for as long as the block runs; then every process of it has ended."""
    folder = Path(tempfile.mkdtemp(prefix="kubernetes-"))
    ready: list[Emulator] = []
    failed: list[BaseException] = []
    up, stop = threading.Event(), asyncio.Event()

    async def run_until_stop() -> None:
        cluster = Cluster(folder)
        api = Api(cluster)
        authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        runner, port = await serve(api, context)
        pem = authority.cert_pem.bytes()
        ready.append(Emulator(cluster, api, f"https://127.0.0.1:{port}", pem))
        up.set()
        await stop.wait()
        await cluster.close()
        await runner.cleanup()

    def run() -> None:
        try:
            asyncio.run(run_until_stop())
        except BaseException as error:
            failed.append(error)
        finally:
            up.set()

    thread = threading.Thread(target=run, name="kubernetes emulator", daemon=True)
    thread.start()
    up.wait()
    try:
        if not ready:
            raise failed[0]
        yield ready[0]
    finally:
        if ready:
            ready[0]._loop.call_soon_threadsafe(stop.set)
        thread.join()
        shutil.rmtree(folder, ignore_errors=True)
    if failed:
        raise failed[0]
