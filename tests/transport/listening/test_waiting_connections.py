"""Which connection makes way: the oldest of the address that has most."""

from __future__ import annotations

import pytest

from peerllm.transport.listening import waiting_connections as module
from peerllm.transport.listening.waiting_connections import (
    LEAST_WAITING,
    MOST_WAITING,
    WaitingConnections,
    most_waiting,
    share_of,
)


def test_a_flood_from_one_address_pushes_out_its_own() -> None:
    waiting: WaitingConnections[str] = WaitingConnections(4)
    assert [waiting.add(name, "10.0.0.1") for name in ("a", "b")] == [None, None]
    out = [waiting.add(f"x{number}", "10.0.0.66") for number in range(100)]
    assert out[:2] == [None, None] and out[2:] == [f"x{number}" for number in range(98)]
    assert list(waiting) == ["a", "b", "x98", "x99"] and len(waiting) == 4


def test_of_one_address_the_oldest_goes_and_who_is_done_does_not_count() -> None:
    waiting: WaitingConnections[int] = WaitingConnections(2)
    waiting.add(1, "a")
    waiting.add(2, "a")
    waiting.discard(1)
    waiting.discard(1)
    assert waiting.add(3, "a") is None
    assert waiting.add(2, "a") is None, "again: it is the newest now"
    assert waiting.add(4, "a") == 3
    assert waiting.make_way() == 2 and waiting.make_way() == 4 and waiting.make_way() is None


def test_many_addresses_that_have_one_each_lose_the_oldest() -> None:
    waiting: WaitingConnections[int] = WaitingConnections(8)
    out = [waiting.add(number, f"10.0.0.{number}") for number in range(20)]
    assert out == [None] * 8 + list(range(12))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("", "", True),
        ("not an address", "another", False),
    ],
)
def test_what_shares_a_part(one: str, other: str, same: bool) -> None:
    assert (share_of(one) == share_of(other)) is same


@pytest.mark.parametrize(
    ("limit", "most"), [(1024, 64), (1 << 20, MOST_WAITING), (64, LEAST_WAITING), (-1, MOST_WAITING)]
)
def test_few_descriptors_let_few_wait(limit: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    assert module.most_waiting() == most == most_waiting()
    assert most_waiting(4) == 4 * most
