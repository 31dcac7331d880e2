"""The API, and the kernels that were pushed to it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "KGAT_as-emulated"
USER = "somebody"
_FOREIGN = ("JUPYTER", "MLINFRA", "XDG_", "IPYTHON", "PYTHONPATH", "KAGGLE")
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

    def __init__(self, folder: Path, request: dict[str, Any]) -> None:
        self.request = request
        self.folder = folder / "working"
        home = folder / "home"
        for made in (self.folder, home, folder / "bin"):
            made.mkdir(parents=True)
        if request.get("machineShape") == "NvidiaTeslaT4":
            (folder / "bin" / "nvidia-smi").write_text(_SMI)
            (folder / "bin" / "nvidia-smi").chmod(0o755)
        script = folder / "script.py"
        script.write_text(request["text"])
        kept = {name: it for name, it in os.environ.items() if not name.startswith(_FOREIGN)}
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.log = folder / "log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(script)],
                cwd=self.folder,
                env=kept | {"HOME": str(home), "PATH": path, "KAGGLE_KERNEL_RUN_TYPE": "Batch"},
                stdout=log,
                stderr=log,
                start_new_session=True,
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
        self.unavailable = 0
        """How many looks at what was pushed still find the service away (HTTP 503)."""
        self._folder = folder
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                service._serve(self)

            def do_GET(self) -> None:
                service._download(self)

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
        missing = [name for name in body.get("datasetDataSources", []) if "missing" in name]
        if missing:
            return 200, {"invalidDatasetSources": missing}
        self.pushed.append(body)
        self.kernels[slug] = Kernel(self._folder / slug, body)
        return 200, {"ref": f"/code/{user}/{slug}", "url": "", "versionNumber": 1, "kernelId": 1}

    def _about(self, body: dict[str, Any], tell: Any) -> tuple[int, dict[str, Any]]:
        kernel = self.kernels.get(body.get("kernelSlug", ""))
        if kernel is None or body.get("userName") != USER:
            return 404, {"code": 404, "message": "Not found"}
        return 200, tell(kernel)

    def _output(self, kernel: Kernel) -> dict[str, Any]:
        files = [
            {"fileName": path.name, "url": f"{self.url}/{kernel.folder.parent.name}/{path.name}"}
            for path in kernel.folder.iterdir()
            if path.is_file()
        ]
        return {"files": files, "log": kernel.log.read_text()}

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
