"""What clouds tell their machines at 169.254.169.254, as far as it is about being taken back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_TOKEN = "a-token-of-this-session"


class Metadata:
    """The services of three clouds, for one machine. ``spot``: it may be taken back."""

    def __init__(self, *, spot: bool = True) -> None:
        self.spot = spot
        self.asked: list[str] = []
        """Paths, in order."""
        self.address = ""
        self._at: datetime | None = None

    def take_back(self, seconds: float) -> None:
        """Give notice of an end in so many seconds."""
        self._at = datetime.fromtimestamp(time.time() + seconds, timezone.utc)

    def keep(self) -> None:
        """It is another machine now, of which nothing is known."""
        self._at = None

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        """Status and body, as the clouds' pages describe them."""
        if path == "/latest/api/token":
            allowed = method == "PUT" and "x-aws-ec2-metadata-token-ttl-seconds" in headers
            return (200, _TOKEN) if allowed else (400, "")
        if path.startswith("/latest/meta-data/"):
            if headers.get("x-aws-ec2-metadata-token") != _TOKEN:
                return 401, ""
            return self._amazon(path.removeprefix("/latest/meta-data/"))
        if path.startswith("/computeMetadata/v1/instance/"):
            if headers.get("metadata-flavor") != "Google":
                return 403, "Missing Metadata-Flavor:Google header."
            return self._google(path.removeprefix("/computeMetadata/v1/instance/"))
        if path.startswith("/metadata/"):
            if headers.get("metadata") != "true":
                return 400, '{"error": "Bad request. Required metadata header not specified"}'
            return self._azure(path.removeprefix("/metadata/"))
        return 404, ""

    def _amazon(self, path: str) -> tuple[int, str]:
        if path == "instance-life-cycle":
            return 200, "spot" if self.spot else "on-demand"
        if path == "spot/instance-action" and self._at is not None:
            at = self._at.strftime("%Y-%m-%dT%H:%M:%SZ")
            return 200, json.dumps({"action": "terminate", "time": at})
        return 404, ""

    def _google(self, path: str) -> tuple[int, str]:
        told = {
            "scheduling/preemptible": self.spot,
            "preempted": self._at is not None,
        }
        return (200, str(told[path]).upper()) if path in told else (404, "")

    def _azure(self, path: str) -> tuple[int, str]:
        if path == "instance/compute/priority?api-version=2021-02-01&format=text":
            return 200, "Spot" if self.spot else "Regular"
        if path == "instance/compute/name?api-version=2021-02-01&format=text":
            return 200, "this_one"
        if path != "scheduledevents?api-version=2020-07-01":
            return 404, ""
        events = [self._event("Preempt", "another_one", 1.0)]
        if self._at is not None:
            left = self._at.timestamp() - time.time()
            events += [self._event("Freeze", "this_one", 1.0)]
            events += [self._event("Preempt", "this_one", left)]
        return 200, json.dumps({"DocumentIncarnation": len(events), "Events": events})

    @staticmethod
    def _event(kind: str, machine: str, seconds: float) -> dict[str, object]:
        at = datetime.fromtimestamp(time.time() + seconds, timezone.utc)
        return {
            "EventId": "602d9444-d2cd-49c7-8624-8643e7171297",
            "EventType": kind,
            "ResourceType": "VirtualMachine",
            "Resources": [machine],
            "EventStatus": "Scheduled",
            "NotBefore": format_datetime(at, usegmt=True),
            "Description": "",
            "EventSource": "Platform",
            "DurationInSeconds": -1,
        }


@contextmanager
def metadata(*, spot: bool = True) -> Iterator[Metadata]:
    """The services on a port of loopback."""
    told = Metadata(spot=spot)

    class Site(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.asked.append(self.path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, body = told.answer(self.command, self.path, headers)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        told.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield told
        finally:
            server.shutdown()
