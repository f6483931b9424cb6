"""Fairness among clients, and the bound."""

from __future__ import annotations

import pytest

from peerllm.daemon.queue import FairQueue
from peerllm.errors import OverloadedError


def test_clients_take_turns_and_the_order_is_known_beforehand():
    queue = FairQueue()
    for number, client in enumerate("aaaabbc"):
        queue.add(number, client)
    expected = [0, 4, 6, 1, 5, 2, 3]
    assert queue.order() == expected
    assert [queue.next() for _ in range(7)] == expected
    assert queue.next() is None


def test_a_newcomer_waits_one_round_not_a_whole_line():
    queue = FairQueue()
    for number in range(10):
        queue.add(number, "greedy")
    assert queue.next() == 0
    queue.add(99, "modest")
    assert [queue.next(), queue.next()] == [1, 99]


def test_who_leaves_is_not_served_and_the_line_is_bounded():
    queue = FairQueue(limit=2)
    queue.add(1, "a")
    queue.add(2, "b")
    with pytest.raises(OverloadedError) as caught:
        queue.add(3, "c")
    assert caught.value.http_status == 429
    queue.remove(1)
    queue.remove(1)
    queue.add(3, "c")
    assert [queue.next(), queue.next(), queue.next()] == [2, 3, None]
