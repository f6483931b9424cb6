"""Heartbeat datagrams without sockets: only the pair makes them, each counts once, in one direction."""

from __future__ import annotations

import pytest

from peerllm.daemon.network.heartbeats.heartbeat_datagram import (
    DATAGRAM_BYTES,
    HeartbeatPair,
    new_half,
    sender_of,
)
from peerllm.errors import BadInputError

A, B, C = "a" * 64, "b" * 64, "c" * 64


def pair(a_half: str = "11" * 32, b_half: str = "22" * 32) -> tuple[HeartbeatPair, HeartbeatPair]:
    return HeartbeatPair(A, B, a_half, b_half), HeartbeatPair(B, A, b_half, a_half)


def test_what_one_sends_the_other_accepts_once_and_in_order() -> None:
    a, b = pair()
    first, second, third = (a.next() for _ in range(3))
    assert {len(one) for one in (first, second, third)} == {DATAGRAM_BYTES}
    assert sender_of(first) == bytes.fromhex(A)[:8]
    assert b.accepts(first) and not b.accepts(first), "a repeated one says nothing"
    assert b.accepts(third) and not b.accepts(second), "nor does one that comes late"
    assert a.accepts(b.next())


def test_nobody_can_send_it_back() -> None:
    a, b = pair()
    assert not a.accepts(a.next())
    reflected = bytearray(a.next())
    reflected[8:16] = bytes.fromhex(B)[:8]
    assert not a.accepts(bytes(reflected))
    assert b.accepts(a.next())


def test_each_changed_bit_is_noticed() -> None:
    a, b = pair()
    good = a.next()
    for place in range(8 * DATAGRAM_BYTES):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        assert sender_of(bytes(bad)) != bytes.fromhex(A)[:8] or not b.accepts(bytes(bad)), place
    assert b.accepts(good), "what was refused has not moved the number"


@pytest.mark.parametrize("halves", [("11" * 32, "33" * 32), ("33" * 32, "22" * 32)])
def test_another_half_is_another_key(halves: tuple[str, str]) -> None:
    (a, _), (_, b) = pair(), pair(*halves)
    assert not b.accepts(a.next())


def test_a_third_device_that_knows_both_its_halves_cannot_speak_for_another() -> None:
    _, b = pair()
    c = HeartbeatPair(C, B, "11" * 32, "22" * 32)
    forged = bytearray(c.next())
    forged[8:16] = bytes.fromhex(A)[:8]
    assert not b.accepts(bytes(forged))


@pytest.mark.parametrize("half", ["", "11" * 31, "11" * 33, "AA" * 32, "zz" * 32, "1" * 63 + "\n", "١" * 64])
def test_a_half_that_is_none_is_refused(half: str) -> None:
    with pytest.raises(BadInputError, match="heartbeat key"):
        HeartbeatPair(A, B, new_half(), half)


@pytest.mark.parametrize("size", [0, 1, DATAGRAM_BYTES - 1, DATAGRAM_BYTES + 1, 1400])
def test_what_has_another_size_is_no_heartbeat(size: int) -> None:
    a, _ = pair()
    assert sender_of((a.next() * 40)[:size]) is None
