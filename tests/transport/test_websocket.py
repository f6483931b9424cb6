"""Websocket messages and the upgrade, byte by byte: what comes through, and what a link does not carry."""

from __future__ import annotations

import base64
import tracemalloc
from http import HTTPStatus
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peerllm.errors import FrameError, LinkError
from peerllm.transport.websocket.framing import (
    BINARY,
    CLOSE,
    MAX_CONTROL_BYTES,
    OK,
    PING,
    PONG,
    RECORD_BYTES,
    TEXT,
    MessageReader,
    control,
    goodbye,
    head,
    read_goodbye,
)
from peerllm.transport.websocket.upgrade import (
    DeclinedError,
    agreed,
    declined,
    read_answer,
    read_request,
    request,
)

LIMIT = 1 << 20
KEY = base64.b64encode(b"0123456789abcdef").decode()


def read(reader: MessageReader, pieces: list[bytes]) -> list[tuple[int, bytes]]:
    """As a connection would."""
    found = []
    for piece in pieces:
        while piece:
            room = reader.room
            assert len(room) >= RECORD_BYTES
            taken = min(RECORD_BYTES, len(piece))
            room[:taken] = piece[:taken]
            reader.filled(taken)
            piece = piece[taken:]
            while (message := reader.next()) is not None:
                found.append((message[0], bytes(message[1])))
    return found


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted({place % (len(data) + 1) for place in at} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(places)]


messages = st.lists(
    st.one_of(
        st.tuples(st.just(BINARY), st.binary(max_size=300)),
        st.tuples(st.just(BINARY), st.sampled_from([125, 126, 65535, 65536, 100_000]).map(bytes)),
        st.tuples(st.sampled_from([PING, PONG, CLOSE]), st.binary(max_size=MAX_CONTROL_BYTES)),
    ),
    max_size=6,
)


@given(messages, st.lists(st.integers(0, 1 << 20), max_size=20), st.booleans())
def test_messages_come_out_as_they_went_in(sent: list[tuple[int, bytes]], places: list[int], by_client: bool) -> None:
    data = [head(opcode, len(payload), by_client) + payload for opcode, payload in sent]
    assert read(MessageReader(LIMIT, by_client), cut(b"".join(data), places)) == sent


def test_split_at_every_byte() -> None:
    sent = [(BINARY, bytes(range(256)) * 3), (PING, b"ping"), (BINARY, b""), (CLOSE, goodbye(OK, "bye"))]
    data = b"".join(head(opcode, len(payload), True) + payload for opcode, payload in sent)
    for at in range(len(data) + 1):
        assert read(MessageReader(LIMIT, True), cut(data, [at])) == sent
    assert read(MessageReader(LIMIT, True), [data[at : at + 1] for at in range(len(data))]) == sent


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (head(TEXT, 5, True) + b"hello", "binary frames only"),
        (b"\x02\x85" + bytes(9), "each in one message"),
        (b"\x80\x85" + bytes(9), "binary frames only"),
        (b"\x83\x80" + bytes(4), "binary frames only"),
        (b"\x8b\x80" + bytes(4), "binary frames only"),
        (b"\xc2\x80" + bytes(4), "nobody agreed on"),
        (b"\x09\x80" + bytes(4), "whole and at most 125"),
        (b"\x89\xfe\x00\x7e" + bytes(130), "whole and at most 125"),
        (b"\x82\x05hello", "masked"),
        (b"\x82\x81\1\0\0\0x", "a mask that is not of zeros"),
        (b"\x82\x81\0\0\0\1x", "a mask that is not of zeros"),
        (b"\x82\xfe\x00\x7d" + bytes(4), "no more bytes than it needs"),
        (b"\x82\xff" + (65535).to_bytes(8, "big") + bytes(4), "no more bytes than it needs"),
        (b"\x82\xff" + (LIMIT + 1).to_bytes(8, "big"), f"{LIMIT + 1} bytes exceeds limit {LIMIT}"),
        (b"\x82\xff" + b"\xff" * 8, f"exceeds limit {LIMIT}"),
    ],
)
def test_what_a_link_does_not_carry(data: bytes, reason: str) -> None:
    with pytest.raises(FrameError, match=reason):
        read(MessageReader(LIMIT, True), [data])
    with pytest.raises(FrameError, match=reason):
        read(MessageReader(LIMIT, True), [data[at : at + 1] for at in range(len(data))])


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_payload_with_a_record_missing(more: int) -> None:
    payload = bytes(range(256)) * 200
    data = head(BINARY, len(payload), True) + payload
    at = len(data) - 2 * RECORD_BYTES - more
    assert read(MessageReader(LIMIT, True), [data[:at], data[at:]]) == [(BINARY, payload)]


def test_a_server_does_not_mask() -> None:
    with pytest.raises(FrameError, match="masked"):
        read(MessageReader(LIMIT, False), [head(BINARY, 0, True)])
    assert read(MessageReader(LIMIT, False), [control(PONG, b"x", False)]) == [(PONG, b"x")]


def test_a_claim_takes_no_memory_beyond_the_limit() -> None:
    reader = MessageReader(LIMIT, True)
    tracemalloc.start()
    with pytest.raises(FrameError):
        read(reader, [b"\x82\xff" + (1 << 40).to_bytes(8, "big") + bytes(100)])
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@given(st.integers(0, 65535), st.text(max_size=200))
def test_a_goodbye_fits_a_control_message(code: int, reason: str) -> None:
    reason = reason.encode(errors="replace").decode()
    payload = goodbye(code, reason)
    assert len(payload) <= MAX_CONTROL_BYTES
    found_code, found = read_goodbye(payload)
    assert found_code == code and reason.startswith(found)


# ---- the upgrade ----------------------------------------------------------------------------------------------------


def test_both_sides_agree() -> None:
    asked = read_request(request("::1%eth0", 8644, "/echo", KEY))
    assert asked == ("/echo", KEY)
    assert b"\r\nHost: [::1]:8644\r\n" in request("::1%eth0", 8644, "/echo", KEY)
    assert read_answer(agreed(KEY), KEY) == 101
    assert read_answer(declined(HTTPStatus.NOT_FOUND), KEY) == 404


GOOD = request("x", 1, "/echo", KEY).decode()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("GET ", "get "),
        ("HTTP/1.1", "HTTP/1.0"),
        ("/echo", "echo"),
        ("/echo", "/ec ho"),
        ("Upgrade: websocket", "Upgrade: h2c"),
        ("Connection: Upgrade", "Connection: close"),
        ("Connection: Upgrade", "Connection Upgrade"),
        ("Connection: Upgrade", "Connection: Upgrade\r\n folded: line"),
        ("Connection: Upgrade", "Connection: Upgrade\r\nConnection: Upgrade"),
        ("GET ", "PUT "),
        ("Connection: Upgrade", "Connection: Upgrade\r\nX: \x00"),
        ("Connection: Upgrade", "connection: upgrade"),
        ("\r\n\r\n", "\r\n\r\nx"),
        ("Version: 13", "Version: 8"),
        (KEY, KEY[:-4]),
        (KEY, "!" * 24),
        (f"Sec-WebSocket-Key: {KEY}\r\n", ""),
        ("\r\n\r\n", "\r\n"),
    ],
)
def test_a_malformed_request_is_declined(old: str, new: str) -> None:
    with pytest.raises(DeclinedError):
        read_request(GOOD.replace(old, new, 1).encode("latin-1"))


@given(st.binary(max_size=300))
def test_any_bytes_are_no_request_or_a_sound_one(data: bytes) -> None:
    for head_bytes in (data, data + b"\r\n\r\n", GOOD[:-2].encode() + data + b"\r\n\r\n"):
        try:
            path, key = read_request(head_bytes)
        except DeclinedError:
            continue
        assert path.startswith("/") and len(base64.b64decode(key)) == 16


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("HTTP/1.1 101", "HTTP/1.1 1O1"),
        ("HTTP/1.1", "SSH-2.0"),
        ("Upgrade: websocket", "Upgrade: h2c"),
        ("Accept: ", "Accept: x"),
        ("Connection: Upgrade", "Connection: Upgrade\r\nSec-WebSocket-Extensions: permessage-deflate"),
        ("Connection: Upgrade", "Connection: Upgrade\r\nSec-WebSocket-Protocol: chat"),
    ],
)
def test_a_client_takes_no_other_answer(old: str, new: str) -> None:
    with pytest.raises(LinkError):
        read_answer(agreed(KEY).decode().replace(old, new, 1).encode(), KEY)
