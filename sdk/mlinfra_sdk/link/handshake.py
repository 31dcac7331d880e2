"""The handshake: both sides prove that they hold the session secret, and agree on a version.

Each proof is the BLAKE3 keyed hash (key: the secret) of the role and of everything both sides have
said so far, including a fresh nonce of each: nothing that was overheard proves anything again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from hmac import compare_digest
from typing import TypeVar

import msgspec
from blake3 import blake3

from mlinfra_sdk.errors import (
    AuthenticationError,
    LinkClosed,
    LinkError,
    ProtocolError,
    VersionMismatch,
)
from mlinfra_sdk.link.frames import CHANNELS, Decoder, Frame, Header, Kind, encode_frame
from mlinfra_sdk.link.wire import Wire

VERSIONS = (1, 1)
"""The oldest and the newest protocol version that this side speaks."""

SECRET_BYTES = 32
NONCE_BYTES = 32
SESSION_ID_BYTES = 16
_PROOF_BYTES = 32


class Hello(msgspec.Struct, frozen=True):
    """What a client says first.  ``attempt`` counts its wires, so that a late one is recognised;
    ``resume`` says that it was connected before and cannot start again."""

    versions: tuple[int, int]
    session: bytes
    attempt: int
    resume: bool
    nonce: bytes
    windows: list[int]
    features: list[str]
    info: dict[str, str]


class Welcome(msgspec.Struct, frozen=True):
    """The server's answer, which follows its proof."""

    version: int
    nonce: bytes
    windows: list[int]
    features: list[str]
    info: dict[str, str]


class Resume(msgspec.Struct, frozen=True):
    """Up to where the sender of this has received: the last number, and the cost of what it has
    consumed on each channel."""

    received: int
    consumed: list[int]


class Close(msgspec.Struct, frozen=True):
    """Why a wire is closed; ``code`` is one of the keys of `_REASONS` or ``bye``."""

    code: str
    text: str


class Peer(msgspec.Struct, frozen=True):
    """What is known about the other side: the protocol version agreed on, its receive windows,
    the features both have, and facts that its application gave (versions of Python and such)."""

    version: int
    windows: list[int]
    features: frozenset[str]
    info: dict[str, str]


_REASONS: dict[str, type[LinkError]] = {
    "authentication": AuthenticationError,
    "version": VersionMismatch,
    "session": LinkClosed,
    "protocol": ProtocolError,
    "late": LinkError,
}
_T = TypeVar("_T")


def closing(code: str, text: str) -> bytes:
    """A CLOSE frame."""
    return encode_frame(Kind.CLOSE, msgspec.msgpack.encode(Close(code, text[:2000])))


def closed(payload: memoryview) -> LinkError:
    """The error that a received CLOSE frame stands for."""
    reason = unpack(payload, Close)
    kind = _REASONS.get(reason.code, LinkClosed)
    return kind(reason.text or "The other side ended the session.")


def unpack(payload: memoryview | bytes, kind: type[_T]) -> _T:
    """Decode a msgpack payload; raises :class:`ProtocolError` if it is not a ``kind``."""
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.MsgspecError, ValueError) as error:
        raise ProtocolError(f"A malformed {kind.__name__} arrived: {error}.") from None


def refuse(header: Header) -> memoryview | None:
    """The decoder's target during the handshake, when no data may come."""
    raise ProtocolError("Data arrived before the handshake was done.")


async def receive_frame(wire: Wire, decoder: Decoder, *kinds: Kind) -> Frame:
    """The next frame, which must be of one of ``kinds``; a CLOSE is raised as its error."""
    count = 0
    while True:
        for frame in decoder.received(count):
            if frame.header.kind == Kind.CLOSE:
                raise closed(frame.payload)
            if frame.header.kind not in kinds:
                raise ProtocolError(
                    f"Kind {frame.header.kind} arrived where "
                    f"{' or '.join(kind.name for kind in kinds)} belongs."
                )
            return frame
        count = await wire.receive_into(decoder.space())
        if not count:
            raise LinkError("The connection ended during the handshake.")


def prove(secret: bytes, role: bytes, *said: bytes) -> bytes:
    """The proof of ``role`` over what has been said, each part after its length."""
    mac = blake3(key=secret)
    for part in (b"mlinfra-link " + role, *said):
        mac.update(len(part).to_bytes(8, "big"))
        mac.update(part)
    return mac.digest()


def _split_proof(payload: memoryview) -> tuple[bytes, bytes]:
    if len(payload) < _PROOF_BYTES:
        raise ProtocolError("A proof is too short.")
    return bytes(payload[:_PROOF_BYTES]), bytes(payload[_PROOF_BYTES:])


async def approach(
    wire: Wire,
    secret: bytes,
    *,
    session: bytes,
    attempt: int,
    resume: Resume,
    resuming: bool,
    windows: list[int],
    features: Iterable[str],
    info: Mapping[str, str],
    versions: tuple[int, int] = VERSIONS,
) -> tuple[Decoder, Peer, Resume]:
    """The client's side of the handshake."""
    decoder = Decoder(refuse)
    hello = msgspec.msgpack.encode(
        Hello(
            versions=versions,
            session=session,
            attempt=attempt,
            resume=resuming,
            nonce=os.urandom(NONCE_BYTES),
            windows=windows,
            features=sorted(features),
            info=dict(info),
        )
    )
    await wire.send([encode_frame(Kind.HELLO, hello)])
    frame = await receive_frame(wire, decoder, Kind.WELCOME)
    proof, welcome_body = _split_proof(frame.payload)
    if not compare_digest(proof, prove(secret, b"server", hello, welcome_body)):
        raise AuthenticationError(
            "The agent did not prove that it holds the session secret.",
            hint="Another agent may have taken its place; start a new one with `%remote restart`.",
        )
    welcome = unpack(welcome_body, Welcome)
    _check_windows(welcome.windows)
    resume_body = msgspec.msgpack.encode(resume)
    proof = prove(secret, b"client", hello, welcome_body, resume_body)
    await wire.send([encode_frame(Kind.AUTH, proof + resume_body)])
    frame = await receive_frame(wire, decoder, Kind.READY)
    peer = Peer(
        version=welcome.version,
        windows=welcome.windows,
        features=frozenset(features) & frozenset(welcome.features),
        info=welcome.info,
    )
    return decoder, peer, unpack(frame.payload, Resume)


async def admit(
    wire: Wire,
    secret: bytes,
    *,
    windows: list[int],
    features: Iterable[str],
    info: Mapping[str, str],
    versions: tuple[int, int] = VERSIONS,
) -> tuple[Decoder, Hello, Peer, Resume]:
    """The server's side of the handshake, up to the client's proof; READY is still to be sent."""
    decoder = Decoder(refuse)
    frame = await receive_frame(wire, decoder, Kind.HELLO)
    hello_body = bytes(frame.payload)
    hello = unpack(hello_body, Hello)
    if len(hello.session) != SESSION_ID_BYTES or len(hello.nonce) != NONCE_BYTES:
        raise ProtocolError("A HELLO has a session id or a nonce of a wrong length.")
    _check_windows(hello.windows)
    version = min(hello.versions[1], versions[1])
    if version < max(hello.versions[0], versions[0]):
        raise VersionMismatch(
            f"The client speaks link protocol {_range(hello.versions)}, "
            f"the agent speaks {_range(versions)}.",
            hint="Install the same mlinfra-sdk on both sides and restart the agent.",
        )
    welcome_body = msgspec.msgpack.encode(
        Welcome(
            version=version,
            nonce=os.urandom(NONCE_BYTES),
            windows=windows,
            features=sorted(features),
            info=dict(info),
        )
    )
    proof = prove(secret, b"server", hello_body, welcome_body)
    await wire.send([encode_frame(Kind.WELCOME, proof + welcome_body)])
    frame = await receive_frame(wire, decoder, Kind.AUTH)
    proof, resume_body = _split_proof(frame.payload)
    expected = prove(secret, b"client", hello_body, welcome_body, resume_body)
    if not compare_digest(proof, expected):
        raise AuthenticationError(
            "The client did not prove that it holds the session secret.",
            hint="The agent was started by another session; use that one's secret.",
        )
    peer = Peer(
        version=version,
        windows=hello.windows,
        features=frozenset(features) & frozenset(hello.features),
        info=hello.info,
    )
    return decoder, hello, peer, unpack(resume_body, Resume)


def _check_windows(windows: list[int]) -> None:
    if len(windows) != CHANNELS or min(windows) <= 0:
        raise ProtocolError("The handshake carries receive windows that make no sense.")


def _range(versions: tuple[int, int]) -> str:
    oldest, newest = versions
    return str(oldest) if oldest == newest else f"{oldest} to {newest}"
