"""Notice that somebody else is going to end the machine: a signal, or what its cloud tells it.

Clouds tell their spot machines at an address of the link that no cable leaves (169.254.169.254),
half a minute (Google, Azure) or two minutes (AWS) before:

- https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
- https://cloud.google.com/compute/docs/instances/preemptible#preemption-process
- https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
"""

from __future__ import annotations

import email.utils
import json
import logging
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from mlinfra_sdk.worker.watchdog import Watchdog

logger = logging.getLogger(__name__)

_PAUSE = 2.0
_PATIENCE = 2.0
_LIMIT_NEAR = 130.0
"""Seconds before the end of a Slurm job at which its signal is about its time limit: 60 were asked
for, and Slurm may be 60 early."""
_BEFORE = 2.0
"""Seconds before the machine is gone at which the agent ends, so that its clients are told."""
_LEAST = 1.0

Cloud = Callable[[str], "float | None"]
"""Asks the service at an address: seconds that are left; None: no notice was given. Raises
OSError, also if this is no machine that may be taken back."""


async def obey_signals(watchdog: Watchdog, grace: float) -> None:
    """SIGINT ends the machine; SIGTERM says that it is going to be taken away, so many seconds
    before, or ends it, too, without any."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            if number == signal.SIGTERM and grace:
                watchdog.taken_away(grace, _why(os.environ))
            else:
                watchdog.end("stopped")


def _why(environ: Mapping[str, str]) -> str:
    if "SLURM_JOB_ID" not in environ:
        return "its host ends it"
    end = environ.get("SLURM_JOB_END_TIME", "")
    if end.isdigit() and int(end) - time.time() < _LIMIT_NEAR:
        return "its time limit in Slurm was reached"
    return "Slurm takes its node back"


async def watch(watchdog: Watchdog) -> None:
    """Ask the cloud that the machine is of, if it is a spot machine of one; otherwise end."""
    found = _cloud(os.environ, Path("/sys/class/dmi/id/sys_vendor"))
    if found is not None:
        await ask(watchdog, *found)


async def ask(watchdog: Watchdog, name: str, cloud: Cloud, address: str) -> None:
    """Ask a cloud every two seconds, until it has given notice or does not know the machine as one
    that it may take back."""
    failed = 0
    while True:
        try:
            seconds = await anyio.to_thread.run_sync(cloud, address, abandon_on_cancel=True)
            failed = 0
        except (OSError, ValueError, LookupError) as error:
            failed += 1
            if isinstance(error, _NotSpot) or failed > 3:
                logger.info("%s is not asked for preemptions: %s", name, error)
                return
            seconds = None
        if seconds is not None:
            left = max(_LEAST, seconds - _BEFORE)
            watchdog.taken_away(left, f"{name} takes back its spot machine")
            return
        await anyio.sleep(_PAUSE)


def _cloud(environ: Mapping[str, str], vendor: Path) -> tuple[str, Cloud, str] | None:
    """By the variables that the clouds' own libraries know, or by what the firmware says."""
    try:
        said = vendor.read_text().strip()
    except (OSError, ValueError):
        said = ""
    aws = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")
    if aws or said == "Amazon EC2":
        return "AWS", aws_notice, (aws or "http://169.254.169.254").rstrip("/")
    google = environ.get("GCE_METADATA_HOST")
    if google or said == "Google":
        return "Google Cloud", google_notice, f"http://{google or '169.254.169.254'}"
    if said == "Microsoft Corporation":  # also where Hyper-V is somebody's own: nobody answers
        return "Azure", azure_notice, "http://169.254.169.254"
    return None


class _NotSpot(OSError):
    """The machine is not one that its cloud may take back."""


def aws_notice(address: str) -> float | None:
    """See :data:`Cloud`."""
    lived = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _ask("PUT", f"{address}/latest/api/token", lived)
    headers = {"X-aws-ec2-metadata-token": token}
    meta = f"{address}/latest/meta-data"
    if _ask("GET", f"{meta}/instance-life-cycle", headers).strip() != "spot":
        raise _NotSpot("it is no spot instance")
    try:
        action = json.loads(_ask("GET", f"{meta}/spot/instance-action", headers))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    at = datetime.fromisoformat(str(action["time"]).replace("Z", "+00:00"))
    return at.timestamp() - time.time()


def google_notice(address: str) -> float | None:
    """See :data:`Cloud`."""
    headers = {"Metadata-Flavor": "Google"}
    instance = f"{address}/computeMetadata/v1/instance"
    if _ask("GET", f"{instance}/scheduling/preemptible", headers).strip() != "TRUE":
        raise _NotSpot("it is no spot machine")
    taken = _ask("GET", f"{instance}/preempted", headers).strip() == "TRUE"
    return 30.0 if taken else None


def azure_notice(address: str) -> float | None:
    """See :data:`Cloud`."""
    headers = {"Metadata": "true"}
    compute = f"{address}/metadata/instance/compute"
    priority = _ask("GET", f"{compute}/priority?api-version=2021-02-01&format=text", headers)
    if priority.strip() not in ("Spot", "Low"):
        raise _NotSpot("it is no spot machine")
    url = f"{address}/metadata/scheduledevents?api-version=2020-07-01"
    # Of a whole group of machines; each event names those that it is about.
    name = _ask("GET", f"{compute}/name?api-version=2021-02-01&format=text", headers).strip()
    events: list[Any] = json.loads(_ask("GET", url, headers))["Events"]
    for event in events:
        if event["EventType"] == "Preempt" and name in event["Resources"]:
            if not event.get("NotBefore"):  # it has begun
                return 0.0
            return email.utils.parsedate_to_datetime(event["NotBefore"]).timestamp() - time.time()
    return None


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""These services are on the machine's own link, whatever proxy the environment names."""


def _ask(method: str, url: str, headers: Mapping[str, str]) -> str:
    request = urllib.request.Request(url, method=method, headers=dict(headers))
    with _opener.open(request, timeout=_PATIENCE) as answer:
        text: bytes = answer.read(1 << 20)
    return text.decode()
