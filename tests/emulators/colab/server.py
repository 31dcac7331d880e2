"""The control plane: what it answers, and what a test can make go wrong."""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from emulators.colab.runtime import Runtime

LOGIN = "ya29.as-emulated"
_PREFIX = ")]}'\n"
_VARIANTS = {"DEFAULT": 0, "GPU": 1, "TPU": 2}
_KNOWN = {"GPU": {"T4", "L4", "G4", "A100", "H100"}, "TPU": {"V5E1", "V6E1"}, "DEFAULT": {"NONE"}}


@dataclass
class Faults:
    """Switches that a test sets; all are off at first."""

    refuse: int = 0
    """Runtimes are refused with this HTTP status."""
    hold: threading.Event | None = None
    """A runtime is only assigned when this is set."""
    wrong_gpu: str = ""
    """Runtimes get this, whatever was asked for."""
    no_machines: bool = False
    """Nothing can be made in a runtime where machines of ours should lie."""
    nonsense: bool = False
    """Answers have another form than they had."""


class Emulator:
    """What a test holds."""

    def __init__(self, folder: Path, sdk: Path) -> None:
        self.faults = Faults()
        self.calls: Counter[str] = Counter()
        self.balance, self.expires = 50.0, 3600
        self.ineligible: set[str] = set()
        self.runtimes: dict[str, Runtime] = {}
        """By the hash of their notebook."""
        self._folder, self._sdk = folder, sdk
        self._xsrf: dict[str, str] = {}
        self._lock = threading.Lock()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                service._serve(self)

            def do_POST(self) -> None:
                service._serve(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Of the control plane."""
        return f"http://{self.address}"

    def close(self) -> None:
        """End it with all its runtimes."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
        for endpoint in [runtime.endpoint for runtime in self.runtimes.values()]:
            self.reclaim(endpoint)

    def reclaim(self, endpoint: str) -> bool:
        """Take a runtime away, as Colab does when it likes."""
        with self._lock:
            for notebook, runtime in self.runtimes.items():
                if runtime.endpoint == endpoint:
                    del self.runtimes[notebook]
                    break
            else:
                return False
        runtime.end()
        return True

    def only(self) -> Runtime:
        """The one runtime that there is."""
        (runtime,) = self.runtimes.values()
        return runtime

    # -- calls ---------------------------------------------------------------------------------

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        inner = re.fullmatch(r"/([^/]+)/unassign", parts.path)
        if inner and request.command == "POST":  # from inside of a runtime
            self.calls["inner unassign"] += 1
            self._answer(request, 200, {})
            self.reclaim(inner[1])
            return
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if request.headers.get("Authorization") != f"Bearer {LOGIN}":
            return self._answer(request, 403, {"error": "no login"})
        if query.pop("authuser", "") != "0" or not request.headers.get("X-Colab-Client-Agent"):
            return self._answer(request, 400, {"error": "no client of Colab"})
        match parts.path.split("/")[1:]:
            case ["tun", "m", call] | ["tun", "m", call, _]:
                self.calls[f"{request.command} {call}"] += 1
        match request.command, parts.path.split("/")[1:]:
            case "GET", ["tun", "m", "ccu-info"]:
                status, answer = 200, self._usage()
            case "GET", ["tun", "m", "assignments"]:
                found = [self._described(it) for it in self.runtimes.values()]
                status, answer = 200, {"assignments": found}
            case "GET", ["tun", "m", "assign"]:
                status, answer = self._look(query)
            case "POST", ["tun", "m", "assign"]:
                status, answer = self._assign(query, request.headers.get("X-Goog-Colab-Token"))
            case method, ["tun", "m", "unassign", endpoint]:
                token = request.headers.get("X-Goog-Colab-Token") if method == "POST" else ""
                status, answer = self._unassign(endpoint, token)
            case _:
                status, answer = 404, {"error": f"not spoken: {request.command} {parts.path}"}
        self._answer(request, status, {"moved": True} if self.faults.nonsense else answer)

    def _answer(self, request: BaseHTTPRequestHandler, status: int, answer: Any) -> None:
        body = (_PREFIX + json.dumps(answer)).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def _usage(self) -> dict[str, Any]:
        return {
            "currentBalance": self.balance,
            "consumptionRateHourly": 1.19 * len(self.runtimes) if self.balance else 0,
            "assignmentsCount": len(self.runtimes),
            "eligibleGpus": ["T4"],
        }

    def _look(self, query: dict[str, str]) -> tuple[int, dict[str, Any]]:
        notebook = query.get("nbh", "")
        if not re.fullmatch(r"[0-9a-f_]{36}\.{8}", notebook):
            return 400, {"error": "nbh"}
        if notebook in self.runtimes:
            return 200, self._described(self.runtimes[notebook])
        token = self._xsrf.setdefault(notebook, secrets.token_hex(8))
        accelerator = query.get("accelerator", "NONE")
        variant = query.get("variant", "DEFAULT")
        return 200, {"acc": accelerator, "nbh": notebook, "token": token, "variant": variant}

    def _assign(self, query: dict[str, str], token: str | None) -> tuple[int, dict[str, Any]]:
        notebook, accelerator = query["nbh"], query.get("accelerator", "NONE")
        if token is None or token != self._xsrf.get(notebook):
            return 403, {"error": "xsrf"}
        if self.faults.hold is not None:
            self.faults.hold.wait(60)
        if self.faults.refuse:
            return self.faults.refuse, {"error": "refused"}
        if accelerator not in _KNOWN[query["variant"]] or accelerator in self.ineligible:
            return 400, {"error": "accelerator"}
        with self._lock:
            if notebook not in self.runtimes:
                self.runtimes[notebook] = self._started(self.faults.wrong_gpu or accelerator)
            runtime = self.runtimes[notebook]
        return 200, self._described(runtime)

    def _started(self, accelerator: str) -> Runtime:
        shorthand = "cpu" if accelerator == "NONE" else accelerator.lower()
        folder = self._folder / f"m-s-{shorthand}-{secrets.token_hex(6)}"
        folder.mkdir()
        runtime = Runtime(folder, accelerator, self._sdk, self.address)
        if self.faults.no_machines:
            (folder / ".cache" / "mlinfra" / "machines").touch()
        return runtime

    def _unassign(self, endpoint: str, token: str | None) -> tuple[int, dict[str, Any]]:
        if endpoint not in (runtime.endpoint for runtime in self.runtimes.values()):
            return 404, {"error": "not assigned"}
        if token == "":
            return 200, {"token": self._xsrf.setdefault(endpoint, secrets.token_hex(8))}
        if token != self._xsrf.get(endpoint):
            return 403, {"error": "xsrf"}
        self.reclaim(endpoint)
        return 200, {}

    def _described(self, runtime: Runtime) -> dict[str, Any]:
        kinds = [name for name, known in _KNOWN.items() if runtime.accelerator in known]
        return {
            "accelerator": runtime.accelerator,
            "endpoint": runtime.endpoint,
            "variant": _VARIANTS[kinds[0]],
            "machineShape": 0,
            "runtimeProxyInfo": {
                "token": runtime.token,
                "tokenExpiresInSeconds": self.expires,
                "url": runtime.url,
            },
        }


@contextmanager
def emulator(folder: Path, sdk: Path) -> Iterator[Emulator]:
    """The service. ``sdk`` is where runtimes find the environments that the bootstrap makes."""
    service = Emulator(folder, sdk)
    try:
        yield service
    finally:
        service.close()
