"""What a run has printed, as text, read from its machine's journal."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mlinfra_sdk.errors import LinkClosed
from mlinfra_sdk.machines.client import AgentClient
from mlinfra_sdk.worker import messages as m
from mlinfra_sdk.worker.records import ENDS, Record

from .messages import Log
from .observers import ask

_MOST = 200_000
"""Characters that are sent at once; of more, the last ones."""
_PATIENCE = 10.0
_ESCAPES = re.compile("\x1b\\[[0-9;]*[A-Za-z]")


async def read(client: AgentClient, info: m.RunInfo, after: int) -> Log:
    """What came after message number ``after``. Each call needs a connection of its own: one that
    follows a run is sent it once."""
    parts: list[str] = []
    last = after
    if info.messages <= after:
        return Log("", after, info.ended > 0)
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    async def sink(record: Record) -> None:
        loop.call_soon_threadsafe(take, record)

    def take(record: Record) -> None:
        nonlocal last
        last = max(last, record.number)
        if record.msg_type not in ENDS and not done.is_set():
            parts.append(text_of(record.msg_type, json.loads(record.content)))
        if record.number >= info.messages or record.msg_type in ENDS:
            done.set()

    def closed(reason: LinkClosed) -> None:
        loop.call_soon_threadsafe(done.set)

    client.listen(info.run, sink)
    client.when_closed(closed)
    await ask(client, m.Attach(client.next_id(), info.run, after, watch=True), m.RunInfo)
    with suppress(asyncio.TimeoutError):  # what has come until then is something, too
        await asyncio.wait_for(done.wait(), _PATIENCE)
    text = _overwritten("".join(parts))
    return Log(text[-_MOST:], last, info.ended > 0, dropped=len(text) > _MOST)


def text_of(msg_type: str, content: dict[str, Any]) -> str:
    """What a message shows where there is only text."""
    show = _SHOWN.get(msg_type)
    return _ESCAPES.sub("", show(content)) if show is not None else ""


def _data(content: dict[str, Any]) -> str:
    text = content.get("data", {}).get("text/plain", "")
    return f"{text}\n" if text else ""


_SHOWN: dict[str, Callable[[dict[str, Any]], str]] = {
    "stream": lambda content: str(content.get("text", "")),
    "display_data": _data,
    "execute_result": _data,
    "error": lambda content: "\n".join(content.get("traceback", ())) + "\n",
}


def _overwritten(text: str) -> str:
    """Lines as they look in the end: progress bars write over themselves."""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
