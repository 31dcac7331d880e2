from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlinfra_sdk.errors import ProtocolError
from mlinfra_sdk.link import frames
from mlinfra_sdk.link.frames import Channel, Decoder, Frame, Header, Kind, encode, encode_frame

PROTOCOL = Path(__file__).parents[2] / "docs" / "protocol.md"
VECTOR = re.compile(r"^\| (?P<meaning>[A-Z][^|]*) \| `(?P<bytes>[0-9a-f ]+)` \|$", re.MULTILINE)


def decode(data: bytes, sizes: list[int] | None = None) -> list[tuple[Header, bytes]]:
    """All frames of ``data``, which arrives in pieces of ``sizes``."""
    decoder = Decoder()
    found = []
    start = 0
    for size in [*(sizes or []), len(data)]:
        for frame in decoder.feed(data[start : start + size]):
            found.append((frame.header, bytes(frame.payload)))
        start += size
    return found


def data_frame(
    payload: bytes, channel: int = 0, number: int = 1, stream: int = 0, size: int | None = None
) -> bytes:
    size = len(payload) if size is None else size
    header = encode(Kind.DATA, payload, channel=channel, number=number, stream=stream, size=size)
    return header + payload


payloads = st.one_of(
    st.binary(max_size=100),
    # Around the sizes at which the decoder changes its ways.
    st.sampled_from([0, 1, 32 << 10, (32 << 10) + 1, 200 << 10, 256 << 10, 1 << 20]).map(bytes),
)
data_frames = st.builds(
    data_frame,
    payloads,
    channel=st.sampled_from(list(Channel)).map(int),
    number=st.integers(1, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
)
other_frames = st.one_of(
    st.builds(
        encode_frame,
        st.sampled_from([Kind.HELLO, Kind.WELCOME, Kind.AUTH, Kind.READY, Kind.CLOSE]),
        st.binary(max_size=4096),
    ),
    st.builds(
        encode_frame,
        st.sampled_from([Kind.PING, Kind.PONG, Kind.ACK]),
        st.binary(max_size=40),
        number=st.integers(0, 2**64 - 1),
    ),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(data_frames | other_frames, max_size=6), st.lists(st.integers(0, 300_000)))
def test_round_trip_in_any_pieces(encoded: list[bytes], sizes: list[int]) -> None:
    found = decode(b"".join(encoded), sizes)
    again = [
        encode(
            header.kind,
            payload,
            channel=header.channel,
            stream=header.stream,
            number=header.number,
            size=header.size,
        )
        + payload
        for header, payload in found
    ]
    assert again == encoded


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=2000))
def test_random_bytes_are_refused_or_incomplete(noise: bytes) -> None:
    try:
        found = decode(noise)
    except ProtocolError:
        return
    assert found == []
    assert len(noise) < frames.HEADER_BYTES


@settings(max_examples=300, deadline=None)
@given(
    st.lists(data_frames.filter(lambda data: len(data) < 1000) | other_frames, min_size=1),
    st.data(),
)
def test_a_flipped_bit_never_changes_what_arrives(
    encoded: list[bytes], data: st.DataObject
) -> None:
    whole = b"".join(encoded)
    before = decode(whole)
    position = data.draw(st.integers(0, len(whole) * 8 - 1))
    flipped = bytearray(whole)
    flipped[position // 8] ^= 1 << position % 8
    frames_before_flip = 0
    end = 0
    for frame in encoded:
        end += len(frame)
        if end * 8 > position:
            break
        frames_before_flip += 1
    struck = before[frames_before_flip][0]
    start = end - len(encoded[frames_before_flip])
    if struck.channel == Channel.BULK and position // 8 - start >= frames.HEADER_BYTES:
        return  # the payload of BULK is verified by its digest, not by the link
    decoder = Decoder()
    found = []
    with pytest.raises(ProtocolError):
        for frame in decoder.feed(flipped):
            found.append((frame.header, bytes(frame.payload)))
    assert found == before[:frames_before_flip]


@settings(max_examples=100, deadline=None)
@given(st.lists(data_frames | other_frames, min_size=1, max_size=4), st.data())
def test_a_truncated_stream_gives_only_whole_frames(
    encoded: list[bytes], data: st.DataObject
) -> None:
    whole = b"".join(encoded)
    kept = data.draw(st.integers(0, len(whole) - 1))
    found = decode(whole[:kept])
    assert found == decode(whole)[: len(found)]
    assert sum(frames.HEADER_BYTES + len(payload) for _, payload in found) <= kept


@pytest.mark.parametrize(
    "malformed",
    [
        encode(99),
        encode(Kind.DATA, b"x", channel=5, number=1, size=1),
        encode(Kind.DATA, b"x", channel=0, number=0, size=1),
        encode(Kind.DATA, b"", channel=0, number=1, size=1),
        encode(Kind.DATA, b"xy", channel=0, number=1, size=1),
        encode(Kind.DATA, b"x", channel=0, number=1, size=frames.MAX_MESSAGE + 1),
        encode(Kind.DATA, bytes(frames.MAX_PAYLOAD + 1), number=1, size=frames.MAX_MESSAGE),
        encode(Kind.HELLO, bytes(frames.MAX_HANDSHAKE + 1)),
        encode(Kind.HELLO, number=1),
        encode(Kind.PING, stream=1),
        encode(Kind.ACK, size=1),
        encode(Kind.CLOSE, channel=1),
    ],
    ids=lambda data: data[2:28].hex(),
)
def test_fields_out_of_bounds_are_refused_from_the_header_alone(malformed: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(malformed[: frames.HEADER_BYTES])


def test_large_payloads_go_straight_to_their_target() -> None:
    message = bytearray(100_000)
    headers = []

    def target(header: Header) -> memoryview:
        headers.append(header)
        return memoryview(message)

    sent = bytes(range(250)) * 400
    data = data_frame(sent, channel=Channel.BULK)
    decoder = Decoder(target)
    found: list[Frame] = []
    for start in range(0, len(data), 5000):
        found += decoder.feed(data[start : start + 5000])
    assert len(headers) == len(found) == 1
    assert found[0].payload.obj is message
    assert message == sent


def test_memory_does_not_depend_on_what_is_claimed() -> None:
    decoder = Decoder()
    header = encode(Kind.DATA, bytes(1 << 20), channel=0, number=1, size=frames.MAX_MESSAGE)
    assert list(decoder.feed(header)) == []
    assert len(decoder.space()) <= frames.MAX_PAYLOAD


def test_vectors_of_the_specification() -> None:
    """docs/protocol.md gives examples; they are what this code reads and writes."""
    text = PROTOCOL.read_text()
    vectors = {found["meaning"]: bytes.fromhex(found["bytes"]) for found in VECTOR.finditer(text)}
    expected = {
        "PING, number 1": encode_frame(Kind.PING, number=1),
        "DATA, CONTROL, number 7, stream 3, message `hello`": data_frame(
            b"hello", number=7, stream=3
        ),
        "DATA, BULK, number 8, stream 9, the last 2 of a message of 6 bytes": data_frame(
            b"ok", channel=Channel.BULK, number=8, stream=9, size=6
        ),
        "ACK, number 8, consumed 261, 0, 0, 0, 262": encode_frame(
            Kind.ACK,
            b"".join(total.to_bytes(8, "big") for total in (261, 0, 0, 0, 262)),
            number=8,
        ),
        "CLOSE, code `bye`, no text": encode_frame(Kind.CLOSE, b"\x82\xa4code\xa3bye\xa4text\xa0"),
    }
    assert vectors == expected
    for data in vectors.values():
        assert len(decode(data)) == 1
