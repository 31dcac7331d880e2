"""One websocket to a kernel of a Jupyter Server, in either of the two protocols for its messages.

Servers since jupyter_server 2.0 carry each part of a message as it is. Older ones, and some
services (Colab), carry a message as JSON, with the buffers behind it if it has any.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Sequence
from datetime import datetime, timezone
from itertools import pairwise
from typing import Any, NamedTuple, cast

import msgspec
import websockets.asyncio.client
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI
from websockets.typing import Subprotocol

from mlinfra_sdk.errors import LinkError
from mlinfra_sdk.link.frames import Buffer
from mlinfra_sdk.providers.jupyter.server import Server, refusal

_SUBPROTOCOL = "v1.kernel.websocket.jupyter.org"
_LARGEST = 64 << 20
_OPEN_WITHIN = 30.0
_PONG_WITHIN = 40.0


class Message(NamedTuple):
    """A message of a kernel."""

    channel: str
    kind: str
    parent: str
    content: dict[str, Any]
    buffers: list[memoryview]


class _Connect(websockets.asyncio.client.connect):
    def process_redirect(self, exc: Exception) -> Exception | str:
        """Never follow: the token is for this server only."""
        return exc


class KernelChannel:
    """Messages to and from one kernel. Every failure is a :class:`LinkError`."""

    def __init__(
        self, websocket: websockets.asyncio.client.ClientConnection, session_id: str
    ) -> None:
        self._websocket = websocket
        self._session_id = session_id
        self._socket = websocket.transport.get_extra_info("socket")
        self._in_parts = websocket.subprotocol == _SUBPROTOCOL

    async def send(
        self, channel: str, kind: str, content: dict[str, Any], buffers: Sequence[Buffer] = ()
    ) -> str:
        """Send a message; returns its id."""
        message_id = uuid.uuid4().hex
        header = {
            "msg_id": message_id,
            "msg_type": kind,
            "username": "mlinfra",
            "session": self._session_id,
            "date": datetime.now(timezone.utc).isoformat(),
            "version": "5.3",
        }
        packed: bytes | str
        if self._in_parts:
            head = [msgspec.json.encode(header), b"{}", b"{}", msgspec.json.encode(content)]
            packed = _pack(channel, [*head, *buffers])
        else:
            packed = _pack_json(channel, header, content, buffers)
        try:
            await self._websocket.send(packed)
        except ConnectionClosed as error:
            raise _cut(error) from None
        return message_id

    async def receive(self) -> Message:
        """The next message; may be cancelled without losing one."""
        try:
            packed = await self._websocket.recv()
            if self._socket is not None and hasattr(socket, "TCP_QUICKACK"):
                # Tornado leaves Nagle's algorithm on: it holds a small message back until the one
                # before is acknowledged, which the system here may put off for 40 ms.
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        except ConnectionClosed as error:
            raise _cut(error) from None
        try:
            if self._in_parts:
                return _unpack(memoryview(cast(bytes, packed)))
            return _unpack_json(packed)
        except (ValueError, KeyError, TypeError, msgspec.DecodeError) as error:
            raise LinkError(f"The server sent a malformed message: {error}.") from None

    async def aclose(self) -> None:
        """Close the websocket; returns at once when the other side is gone."""
        await self._websocket.close()


async def open_channel(server: Server, kernel_id: str) -> KernelChannel:
    """A new websocket to the kernel, with a session of its own.

    The server keeps for a session what the kernel published while its websocket was cut. The link
    needs none of that: it asks again for whatever was lost, in both directions.
    """
    session_id = uuid.uuid4().hex
    url = server.websocket_url(f"api/kernels/{kernel_id}/channels?session_id={session_id}")
    try:
        websocket = await _Connect(
            url,
            additional_headers=await server.headers(),
            subprotocols=[Subprotocol(_SUBPROTOCOL)],
            compression=None,
            ssl=server.tls if url.startswith("wss:") else None,
            max_size=_LARGEST,
            open_timeout=_OPEN_WITHIN,
            ping_timeout=_PONG_WITHIN,
            close_timeout=1.0,
        )
    except InvalidStatus as error:
        raise refusal(server, error.response.status_code, f"api/kernels/{kernel_id}") from None
    except (OSError, TimeoutError, InvalidHandshake, InvalidURI) as error:
        raise server.unreachable(error) from None
    return KernelChannel(websocket, session_id)


def _pack(channel: str, parts: Sequence[Buffer]) -> bytes:
    name = channel.encode()
    offsets = [8 * (len(parts) + 3)]
    for part in (name, *parts):
        offsets.append(offsets[-1] + len(part))
    numbers = [len(offsets), *offsets]
    return b"".join([*(number.to_bytes(8, "little") for number in numbers), name, *parts])


def _unpack(packed: memoryview) -> Message:
    count = int.from_bytes(packed[:8], "little")
    if not 6 <= count <= len(packed) // 8 - 1:
        raise ValueError(f"{count} parts in {len(packed)} bytes")
    offsets = [int.from_bytes(packed[8 * i : 8 * i + 8], "little") for i in range(1, count + 1)]
    name, header, parent, _, content, *buffers = (
        packed[start:end] for start, end in pairwise(offsets)
    )
    return Message(
        bytes(name).decode(),
        str(msgspec.json.decode(header)["msg_type"]),
        str(msgspec.json.decode(parent).get("msg_id", "")),
        msgspec.json.decode(content, type=dict[str, Any]),
        buffers,
    )


def _pack_json(
    channel: str, header: dict[str, str], content: dict[str, Any], buffers: Sequence[Buffer]
) -> bytes | str:
    """A text without buffers; else their number, where each part begins, the text, the buffers."""
    message = {
        "channel": channel,
        "header": header,
        "parent_header": {},
        "metadata": {},
        "content": content,
    }
    text = msgspec.json.encode(message)
    if not buffers:
        return text.decode()
    parts = [text, *buffers]
    offsets = [4 * (len(parts) + 1)]
    for part in parts[:-1]:
        offsets.append(offsets[-1] + len(part))
    numbers = [len(parts), *offsets]
    return b"".join([*(number.to_bytes(4, "big") for number in numbers), *parts])


class _Head(msgspec.Struct):
    msg_type: str = ""
    msg_id: str = ""


class _JsonMessage(msgspec.Struct):
    channel: str
    header: _Head
    parent_header: _Head
    content: dict[str, Any]


def _unpack_json(packed: bytes | str) -> Message:
    buffers: list[memoryview] = []
    text: memoryview | str = ""
    if isinstance(packed, str):
        text = packed
    else:
        view = memoryview(packed)
        count = int.from_bytes(view[:4], "big")
        if not 1 <= count <= len(view) // 4 - 1:
            raise ValueError(f"{count} parts in {len(view)} bytes")
        offsets = [int.from_bytes(view[4 * i : 4 * i + 4], "big") for i in range(1, count + 1)]
        text, *buffers = (view[start:end] for start, end in pairwise([*offsets, len(view)]))
    message = msgspec.json.decode(text, type=_JsonMessage)
    return Message(
        message.channel,
        message.header.msg_type,
        message.parent_header.msg_id,
        message.content,
        buffers,
    )


def _cut(error: ConnectionClosed) -> LinkError:
    return LinkError(
        f"The kernel's websocket broke: {error.rcvd.reason if error.rcvd else 'no goodbye'}.",
        hint="It is made again by itself.",
    )
