"""The API, and the kernels that were pushed to it."""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "KGAT_as-emulated"
USER = "somebody"
_FOREIGN = ("JUPYTER", "MLINFRA", "XDG_", "IPYTHON", "PYTHONPATH", "KAGGLE")
_LOGS = "/api/v1/kernels/logs/stream/"
_UPLOADS = "/upload/"
_NOT_FOUND = (404, {"code": 404, "message": "Not found"})
_SMI = """#!/bin/sh
case "$1" in
  --query-gpu=uuid,memory.total,name) i=0
    while [ $i -lt 2 ]; do echo "GPU-$i, 15360, Tesla T4"; i=$((i+1)); done ;;
  *) echo "not recorded: $*" >&2; exit 2 ;;
esac
"""
"""A stand-in for nvidia-smi: recorded answers."""


class Kernel:
    """One that was pushed, which runs at once."""

    def __init__(
        self, folder: Path, request: dict[str, Any], mounts: dict[str, dict[str, bytes]]
    ) -> None:
        self.request = request
        self.folder = folder / "working"
        home = folder / "home"
        for made in (self.folder, home, folder / "bin"):
            made.mkdir(parents=True)
        for place, files in mounts.items():
            (folder / "input" / "datasets" / place).mkdir(parents=True)
            for name, data in files.items():
                (folder / "input" / "datasets" / place / name).write_bytes(data)
        if request.get("machineShape") == "NvidiaTeslaT4":
            (folder / "bin" / "nvidia-smi").write_text(_SMI)
            (folder / "bin" / "nvidia-smi").chmod(0o755)
        script = folder / "script.py"
        script.write_text(request["text"])
        kept = {name: it for name, it in os.environ.items() if not name.startswith(_FOREIGN)}
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.log: list[dict[str, Any]] = []
        self.news = threading.Condition()
        self._begun = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            cwd=self.folder,
            env=kept | {"HOME": str(home), "PATH": path, "KAGGLE_KERNEL_RUN_TYPE": "Batch"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._readers = [
            threading.Thread(target=self._read, args=it, daemon=True)
            for it in (("stdout", self.process.stdout), ("stderr", self.process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str, pipe: Any) -> None:
        """Into the log, in pieces as the process writes them."""
        with pipe:
            while data := os.read(pipe.fileno(), 1000):
                event = {"stream_name": name, "time": time.monotonic() - self._begun}
                with self.news:
                    self.log.append(event | {"data": data.decode("utf-8", "replace")})
                    self.news.notify_all()
        with self.news:
            self.news.notify_all()

    def events(self) -> Iterator[dict[str, Any]]:
        """The log from its beginning to its end, as it grows."""
        for number in itertools.count():
            with self.news:
                while number == len(self.log):
                    if self.over:
                        return
                    self.news.wait(1)
            yield self.log[number]

    @property
    def over(self) -> bool:
        """Whether its log is complete."""
        return self.process.poll() is not None and not any(
            reader.is_alive() for reader in self._readers
        )

    @property
    def status(self) -> str:
        code = self.process.poll()
        return "RUNNING" if code is None else "ERROR" if code else "COMPLETE"

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Emulator:
    """What a test holds."""

    def __init__(self, folder: Path) -> None:
        self.kernels: dict[str, Kernel] = {}
        self.pushed: list[dict[str, Any]] = []
        self.datasets: dict[str, dict[str, bytes]] = {}
        """By their addresses: the files of each, by name."""
        self.full = False
        """Whether the account's room for private datasets is used up."""
        self.processes = True
        """Whether new datasets become ready, which takes until the second look."""
        self._unready: set[str] = set()
        self._blobs: dict[str, tuple[str, bytes]] = {}
        self.unavailable = 0
        """How many looks at what was pushed still find the service away (HTTP 503)."""
        self.has_logs = True
        """Whether it knows the call for a log that grows."""
        self.cuts = 0
        """How often such a log is still cut off after its next event."""
        self.followed = 0
        """How often one has been asked for."""
        self._folder = folder
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                service._serve(self)

            def do_GET(self) -> None:
                if self.path.startswith(_LOGS):
                    service._follow(self)
                else:
                    service._download(self)

            def do_PUT(self) -> None:
                service._receive(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it with all that runs."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        for kernel in self.kernels.values():
            kernel.end()

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        if self.unavailable and request.path.endswith(("Status", "DeleteKernel")):
            self.unavailable -= 1
            return self._answer(request, 503, {"code": 503, "message": "away"})
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(request, 401, {"code": 401, "message": "Unauthenticated"})
        match request.path.removeprefix("/api/v1/"):
            case "security.OAuthService/IntrospectToken":
                status, answer = 200, {"active": body["token"] == TOKEN, "username": USER}
            case "kernels.KernelsApiService/GetAcceleratorQuotaStatistics":
                status, answer = 200, self._quota()
            case "kernels.KernelsApiService/SaveKernel":
                status, answer = self._save(body)
            case "kernels.KernelsApiService/GetKernelSessionStatus":
                status, answer = self._about(body, lambda kernel: {"status": kernel.status})
            case "kernels.KernelsApiService/ListKernelSessionOutput":
                status, answer = self._about(body, self._output)
            case "kernels.KernelsApiService/DeleteKernel":
                status, answer = self._about(body, lambda kernel: {})
                if status == 200:
                    self.kernels.pop(body["kernelSlug"]).end()
            case "blobs.BlobApiService/StartBlobUpload":
                status, answer = self._start_upload(body)
            case "datasets.DatasetApiService/CreateDataset":
                status, answer = self._create_dataset(body)
            case "datasets.DatasetApiService/GetDatasetStatus":
                status, answer = self._dataset_status(body)
            case "datasets.DatasetApiService/DeleteDataset":
                found = self.datasets.pop(f"{body['ownerSlug']}/{body['datasetSlug']}", None)
                status, answer = (200, {}) if found is not None else _NOT_FOUND
            case other:
                status, answer = 404, {"code": 404, "message": f"not spoken: {other}"}
        self._answer(request, status, answer)

    def _answer(self, request: BaseHTTPRequestHandler, status: int, answer: Any) -> None:
        self._send(request, status, "application/json", json.dumps(answer).encode())

    def _send(self, request: BaseHTTPRequestHandler, status: int, kind: str, data: bytes) -> None:
        request.send_response(status)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _quota(self) -> dict[str, Any]:
        gpu = {"timeUsed": "9000s", "totalTimeAllowed": "108000s"}
        return {"quotaRefreshTime": "2026-11-28T00:00:00.000Z", "gpuQuota": gpu}

    def _save(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        user, _, slug = body.get("slug", "").partition("/")
        title = body.get("newTitle", "")
        plain = re.sub(r"[^a-z0-9]+", "-", title.lower())
        if user != USER or slug != plain or not 5 <= len(title) <= 50:
            return 400, {"code": 400, "message": f"bad slug or title: {body.get('slug')} {title}"}
        if (body.get("language"), body.get("kernelType")) != ("python", "script"):
            return 400, {"code": 400, "message": "bad kernel type"}
        sources = body.get("datasetDataSources", [])
        missing = [it for it in sources if it not in self.datasets or it in self._unready]
        if missing:
            return 200, {"invalidDatasetSources": missing}
        self.pushed.append(body)
        mounts = {it: self.datasets[it] for it in sources}
        self.kernels[slug] = Kernel(self._folder / slug, body, mounts)
        return 200, {"ref": f"/code/{user}/{slug}", "url": "", "versionNumber": 1, "kernelId": 1}

    def _start_upload(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if body.get("type") != "DATASET" or not body.get("name") or not body.get("contentLength"):
            return 400, {"code": 400, "message": f"bad blob: {body}"}
        token = secrets.token_hex(8)
        self._blobs[token] = (body["name"], b"")
        return 200, {"token": token, "createUrl": f"{self.url}{_UPLOADS}{token}"}

    def _receive(self, request: BaseHTTPRequestHandler) -> None:
        """The content of a blob; its address is its permission."""
        token = request.path.removeprefix(_UPLOADS)
        name, _ = self._blobs[token]
        self._blobs[token] = (name, request.rfile.read(int(request.headers["Content-Length"])))
        self._answer(request, 200, {})

    def _create_dataset(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        slug = body.get("slug", "")
        address = f"{body.get('ownerSlug')}/{slug}"
        if self.full:
            return 200, {"status": "Error", "error": "The maximum of private data is exceeded"}
        if (
            body.get("ownerSlug") != USER
            or address in self.datasets
            or not 6 <= len(slug) <= 50
            or not 6 <= len(body.get("title", "")) <= 50
            or body.get("licenseName") not in ("CC0-1.0", "other", "unknown")
            or not body.get("isPrivate")
        ):
            return 400, {"code": 400, "message": f"bad dataset: {body}"}
        self.datasets[address] = dict(self._blobs.pop(it["token"]) for it in body["files"])
        self._unready.add(address)
        return 200, {"ref": address, "url": "", "status": "Ok", "error": ""}

    def _dataset_status(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        address = f"{body['ownerSlug']}/{body['datasetSlug']}"
        if address not in self.datasets:
            return _NOT_FOUND
        ready = address not in self._unready
        if self.processes:
            self._unready.discard(address)
        return 200, {"status": "READY" if ready else "BLOBS_RECEIVED"}

    def _about(self, body: dict[str, Any], tell: Any) -> tuple[int, dict[str, Any]]:
        kernel = self.kernels.get(body.get("kernelSlug", ""))
        if kernel is None or body.get("userName") != USER:
            return _NOT_FOUND
        return 200, tell(kernel)

    def _output(self, kernel: Kernel) -> dict[str, Any]:
        files = [
            {"fileName": path.name, "url": f"{self.url}/{kernel.folder.parent.name}/{path.name}"}
            for path in kernel.folder.iterdir()
            if path.is_file()
        ]
        return {"files": files, "log": json.dumps(kernel.log)}

    def _follow(self, request: BaseHTTPRequestHandler) -> None:
        """The log as server-sent events while the kernel runs, and as a list afterwards."""
        self.followed += 1
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(request, 401, {"code": 401, "message": "Unauthenticated"})
        user, _, slug = request.path.removeprefix(_LOGS).partition("/")
        kernel = self.kernels.get(slug) if user == USER and self.has_logs else None
        if kernel is None:
            return self._answer(request, *_NOT_FOUND)
        if kernel.over:
            return self._answer(request, 200, kernel.log)
        request.send_response(200)
        request.send_header("Content-Type", "text/event-stream")
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        with suppress(OSError):  # who has asked may go at any time
            for event in kernel.events():
                self._say(request, json.dumps(event))
                if self.cuts:
                    self.cuts -= 1
                    request.close_connection = True
                    return None
            self._say(request, "END_OF_LOG")
            request.wfile.write(b"0\r\n\r\n")
        return None

    def _say(self, request: BaseHTTPRequestHandler, payload: str) -> None:
        data = f"data: {payload}\n\n".encode()
        request.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _download(self, request: BaseHTTPRequestHandler) -> None:
        slug, _, name = request.path.lstrip("/").partition("/")
        data = (self.kernels[slug].folder / Path(name).name).read_bytes()
        self._send(request, 200, "application/octet-stream", data)


@contextmanager
def emulator(folder: Path) -> Iterator[Emulator]:
    """The service."""
    service = Emulator(folder)
    try:
        yield service
    finally:
        service.close()
