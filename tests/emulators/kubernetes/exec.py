"""``exec`` as ``kubectl`` speaks it, the websocket protocol ``v5.channel.k8s.io``, and as older
clients do, ``v4``, which cannot end a command's stdin.

Each binary message begins with the number of its channel. The last word on the error channel is a
``Status`` with the exit status.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

from aiohttp import WSMsgType, web

from emulators.kubernetes.pods import Pod

_V5 = "v5.channel.k8s.io"
_PROTOCOLS = (_V5, "v4.channel.k8s.io")
_STDIN, _STDOUT, _STDERR, _ERROR, _CLOSE = 0, 1, 2, 3, 255
_CHUNK = 32 << 10
_detached: set[asyncio.Task[int]] = set()


async def serve_exec(request: web.Request, pod: Pod) -> web.StreamResponse:
    """Run a command in a pod. A client that goes away closes the command's stdin and reads its
    output no longer; the command itself is not killed."""
    socket = web.WebSocketResponse(protocols=_PROTOCOLS, compress=False, max_msg_size=0)
    await socket.prepare(request)
    if socket.ws_protocol not in _PROTOCOLS:
        await socket.close(code=1002)
        return socket
    try:
        process = await pod.exec(request.query.getall("command"))
    except OSError as error:
        await _say_end(socket, {"status": "Failure", "message": str(error), "code": 500})
        return socket
    assert process.stdin and process.stdout and process.stderr
    outputs = [
        asyncio.create_task(_pump(process.stdout, _STDOUT, socket)),
        asyncio.create_task(_pump(process.stderr, _STDERR, socket)),
    ]
    reading = asyncio.create_task(_feed(socket, process.stdin))
    try:
        done = asyncio.gather(*outputs, return_exceptions=True)
        await asyncio.wait((done, reading), return_when=asyncio.FIRST_COMPLETED)
        if done.done() and done.result() == [None, None]:
            await _say_end(socket, _status(await process.wait()))
    finally:
        for task in (*outputs, reading):
            task.cancel()
        for number in range(3):
            pipe = process._transport.get_pipe_transport(number)  # type: ignore[attr-defined]
            if pipe is not None:
                pipe.close()
        # Without somebody who waits for it, asyncio would kill it.
        waiting = asyncio.ensure_future(process.wait())
        _detached.add(waiting)
        waiting.add_done_callback(_detached.discard)
    return socket


async def _feed(socket: web.WebSocketResponse, stdin: asyncio.StreamWriter) -> None:
    """Bytes of the client to the command, until the client is gone."""
    async for message in socket:
        if message.type != WSMsgType.BINARY or not message.data:
            continue
        channel, data = message.data[0], message.data[1:]
        with suppress(ConnectionError):  # the command has ended, or reads no more
            if channel == _STDIN:
                stdin.write(data)
                await stdin.drain()
            elif socket.ws_protocol == _V5 and channel == _CLOSE and data == bytes([_STDIN]):
                stdin.close()


async def _pump(source: asyncio.StreamReader, channel: int, socket: web.WebSocketResponse) -> None:
    while data := await source.read(_CHUNK):
        await socket.send_bytes(bytes([channel]) + data)


def _status(code: int) -> dict[str, Any]:
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    code = 128 - code if code < 0 else code
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"command terminated with non-zero exit code: exit status {code}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


async def _say_end(socket: web.WebSocketResponse, status: dict[str, Any]) -> None:
    with suppress(ConnectionError):
        await socket.send_bytes(bytes([_ERROR]) + json.dumps(status).encode())
        await socket.close()
