"""Clients that can be killed at any instant, and what is left of them afterwards.

A nursery is a process that has imported everything and forks: a client lives as soon as it is
asked for. It begins with a quote, launches a machine, runs two cells and stops it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IDLE = 3.0
"""Seconds after which a machine of these clients ends without work."""


class Nursery:
    """Forks clients and those who clean up after them."""

    def __init__(self, environment: Mapping[str, str] = {}) -> None:
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path} | dict(environment),
            start_new_session=True,
        )

    def start(self, what: str, **job: Any) -> int:
        """Fork a process that does one of the functions below; gives its id."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"what": what, **job}) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def wait(self) -> int:
        """Until the process that was forked first, of those not waited for, has ended; gives its
        status."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def do(self, what: str, **job: Any) -> Any:
        """Have something done, and give its result."""
        self.start(what, **job)
        status = self.wait()
        result = Path(job["home"], "result.json")
        if status != 0 or not result.exists():
            log = Path(job["home"], "log")
            raise RuntimeError(f"{what} failed ({status}): {log.read_text()[-3000:]}")
        found = json.loads(result.read_text())
        result.unlink()
        return found

    def close(self) -> None:
        """End the nursery and everybody in it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


@contextlib.contextmanager
def nursery(environment: Mapping[str, str] = {}) -> Iterator[Nursery]:
    """A nursery for a while; its clients see ``environment`` from their first instruction on."""
    it = Nursery(environment)
    try:
        yield it
    finally:
        it.close()


# -- in the nursery ------------------------------------------------------------------------------


def life(job: dict[str, Any]) -> None:
    """A client from its quote to its end."""
    from mlinfra_sdk.catalog import parse_gpus
    from mlinfra_sdk.machines import market
    from mlinfra_sdk.machines.portal import portal
    from mlinfra_sdk.providers import base
    from mlinfra_sdk.session import Session
    from mlinfra_sdk.spec import Request
    from mlinfra_sdk.worker.watchdog import Limits

    settings = {"env": "none", "sync": False, "idle": IDLE, **job["request"]}
    if "gpu" in settings:
        settings["gpu"] = parse_gpus(settings["gpu"])
    if "lease" in job:  # no setting says it: nobody has to wait two hours here
        base.Limits = functools.partial(Limits, lease=job["lease"])  # type: ignore[misc,assignment]
    request = Request(**settings)
    portal().call(market.offers(request))
    session = Session(namespace={}, request=request, notebook="life.ipynb")
    session.run("x = 1")
    if "lease" in job:
        session.run("import time; time.sleep(3600)")
    session.run("x += 1")
    assert session.namespace["x"] == 2
    if "forever" in job:
        signal.pause()
    session.stop()


def settled(job: dict[str, Any]) -> dict[str, Any]:
    """Sweep as a later session would, take bills over, and tell what the ledger says. Nobody waits
    for a launch that may go on, nor until the hours are over that are billed: whose claim is free
    is dead, and the record is made older by ``older`` seconds."""
    import sqlite3

    from mlinfra_sdk.ledger import Ledger
    from mlinfra_sdk.machines import lifecycle
    from mlinfra_sdk.machines.portal import portal
    from mlinfra_sdk.machines.reconcile import reconcile
    from mlinfra_sdk.machines.sweep import sweep

    lifecycle._LAUNCHING = 0.0
    with contextlib.closing(Ledger.open()) as ledger:
        found = portal().call(sweep(ledger))
        again = portal().call(sweep(ledger))
        if job.get("older"):
            with sqlite3.connect(ledger.path) as connection:
                for table, column in (
                    ("machines", "intended_at"),
                    ("machines", "started_at"),
                    ("machines", "stopped_at"),
                    ("runs", "opened_at"),
                ):
                    connection.execute(f"UPDATE {table} SET {column} = {column} - {job['older']}")
            for _ in range(2):  # a bill that is asked for again must not count again
                portal().call(reconcile(ledger, again_after=0.0))
        costs = ledger.costs()
        return {
            "ledger": ledger.id,
            "machines": {
                it.id: [it.started_at, it.stopped_at, it.stop_reason] for it in ledger.machines()
            },
            "open": [it.id for it in ledger.machines(active=True)],
            "open_runs": sum(run.seconds is None for run in ledger.runs()),
            "estimate": costs.estimate.total,
            "billed": costs.billed.total,
            "best": costs.best.total,
            "sums": all(
                it.total == it.idle + sum(it.runs.values())
                for it in (costs.estimate, costs.billed, costs.best)
            ),
            "found": [str(it) for it in found.findings],
            "again": [str(it) for it in again.findings],
            "notes": again.notes,
        }


def _serve() -> None:
    import mlinfra_sdk.cli_sweep
    import mlinfra_sdk.session  # noqa: F401

    with contextlib.suppress(ImportError):
        import modal  # noqa: F401
    children: list[int] = []
    for line in sys.stdin:
        if line.strip():
            job = json.loads(line)
            child = os.fork()
            if child == 0:
                _be(job)
            children.append(child)
            print(child, flush=True)
        else:
            print(os.waitstatus_to_exitcode(os.waitpid(children.pop(0), 0)[1]), flush=True)


def _be(job: dict[str, Any]) -> None:
    status = 1
    home = Path(job["home"])
    try:
        log = os.open(home / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.environ["MLINFRA_HOME"] = job.get("state", str(home))
        os.environ["MLINFRA_SWEEP"] = "no"
        os.environ.update(job.get("environment", {}))
        os.chdir(home)
        if job["what"] == "life":
            life(job)
        else:
            (home / "result.json").write_text(json.dumps(settled(job)))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # No clean-up of the parent's: what a client does at its end, it has done.
        sys.stdout.flush()
        os._exit(status)


def at(pid: int, seconds: float) -> None:
    """Kill a process so long from now, if it still lives."""
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
