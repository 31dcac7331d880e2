"""The agent's process, from its start to its end."""

from __future__ import annotations

import logging
import os
import select
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import anyio

from mlinfra_sdk._version import __version__
from mlinfra_sdk.link.server import LinkServer, serve
from mlinfra_sdk.link.unix import serve_unix
from mlinfra_sdk.objects.compression import FEATURE
from mlinfra_sdk.worker import activity, preemption, upkeep
from mlinfra_sdk.worker.agent import Agent
from mlinfra_sdk.worker.folder import SOCKET, Config, load_config, record_end
from mlinfra_sdk.worker.host import Host

logger = logging.getLogger(__name__)

_UNKNOWN = "its launcher was gone before it was ready"


async def run(folder: Path, config: Config, announce: Callable[[], None]) -> str:
    """Run an agent in ``folder`` until something ends it; gives the reason.

    ``announce`` is called when clients can connect.
    """
    async with anyio.create_task_group() as tasks:
        agent = Agent(folder, config, tasks)
        if config.prestart:
            agent.prestart("main")
        info = {"version": __version__, "store": agent.store.id}

        async def listen(server: LinkServer) -> None:
            await serve_unix(folder / SOCKET, server.handle)

        async with serve(config.secret, agent.on_session, features=[FEATURE], info=info) as server:
            tasks.start_soon(listen, server)
            watchdog = agent.watchdog
            tasks.start_soon(preemption.obey_signals, watchdog, config.grace)
            if config.grace:
                tasks.start_soon(preemption.watch, watchdog)
            tasks.start_soon(agent.monitor.watch)
            tasks.start_soon(activity.watch, lambda: watchdog.idle_seconds, watchdog.worked)
            if not config.shared_fs:  # a shared store is in its client's care
                host = Host(folder.parent.parent)
                tasks.start_soon(upkeep.keep_room, agent.store, host)
            while not (folder / SOCKET).exists():
                await anyio.sleep(0.001)
            try:
                announce()
            except BrokenPipeError:
                agent.watchdog.end(_UNKNOWN)
            reason = await agent.watchdog.wait()
            logger.info("The agent ends: %s", reason)
            await agent.close()
        tasks.cancel_scope.cancel()
    if reason == _UNKNOWN and not any(agent.runs.listed()):
        shutil.rmtree(folder, ignore_errors=True)
    record_end(folder, reason, agent.watchdog.uptime)
    return reason


def main() -> None:
    """``python -m mlinfra_sdk.worker DIRECTORY``: prints ``ready`` when clients can connect."""
    folder = Path(sys.argv[1])
    if _abandoned():  # the folder may be another agent's by now
        sys.exit("The launcher of this agent is gone.")
    config = load_config(folder)
    os.close(os.open(folder / "agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    logging.basicConfig(
        filename=folder / "agent.log",
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )

    ready, complaints = os.dup(1), os.fdopen(os.dup(2), "w")
    _redirect_output(folder / "kernel.log")

    def announce() -> None:
        with complaints:
            os.write(ready, b"ready\n")
            os.close(ready)

    try:
        anyio.run(run, folder, config, announce)
    except Exception:
        if not complaints.closed:
            traceback.print_exc(file=complaints)
        raise


def _abandoned() -> bool:
    """Whether nobody reads any more what this process prints."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _redirect_output(log: Path) -> None:
    """What kernels inherit: their launcher soon stops to read, and what they write below Python
    is shown in the notebook and also written here, which must neither block nor fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(null, 1)
    os.dup2(errors, 2)
    os.close(null)
    os.close(errors)
