"""Fairness among clients, and the bound."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.daemon.decide.fair_queue import FairQueue, asker_of
from peerllm.errors import OverloadedError
from tests.sizes import examples


def test_clients_take_turns_and_the_order_is_known_beforehand():
    queue, held = FairQueue(), Counter()
    clients = "aaaabbc"
    for number, client in enumerate(clients):
        queue.add(number, client)
    expected = [0, 4, 6, 1, 5, 2, 3]
    assert queue.order(held) == expected
    for number in expected:
        assert queue.next(held) == number
        held[clients[number]] += 1
    assert queue.next(held) is None


def test_a_newcomer_waits_one_round_not_a_whole_line():
    queue = FairQueue()
    for number in range(10):
        queue.add(number, "greedy")
    assert queue.next({}) == 0
    queue.add(99, "modest")
    assert [queue.next({"greedy": 1}), queue.next({"greedy": 1, "modest": 1})] == [99, 1]
    assert queue.order({"greedy": 4, "modest": 1}) == list(range(2, 10))


def test_who_leaves_is_not_served_and_the_line_is_bounded():
    queue = FairQueue(limit=2)
    queue.add(1, "a")
    queue.add(2, "b")
    with pytest.raises(OverloadedError, match="2 answers are waiting") as caught:
        queue.add(3, "c")
    assert caught.value.http_status == 429
    queue.remove(1)
    queue.remove(1)
    queue.add(3, "c")
    assert [queue.next({}), queue.next({}), queue.next({})] == [2, 3, None]


def test_a_greedy_client_leaves_room_for_the_next():
    queue = FairQueue(limit=16)
    number = iter(range(100))
    for client, most in (("a", 8), ("b", 4), ("c", 2), ("d", 1)):
        for _ in range(most):
            queue.add(next(number), client)
        with pytest.raises(OverloadedError, match=f"{most} answers of yours are waiting"):
            queue.add(99, client)
    assert len(queue) == 15


CLIENTS = st.sampled_from("abcd")
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), CLIENTS), st.tuples(st.just("end"), st.integers(0, 9)),
        st.tuples(st.just("leave"), st.integers(0, 9)),
    ),
    max_size=120,
)  # fmt: skip


@settings(max_examples=examples(150))
@given(EVENTS, st.integers(1, 6))
def test_no_slot_goes_to_who_holds_more_than_another_who_waits(events, slots):
    queue, client_of = FairQueue(40), {}
    running: list[int] = []
    waiting: list[int] = []
    for number, (what, value) in enumerate(events):
        if what == "ask":
            try:
                queue.add(number, value)
            except OverloadedError:
                assert sum(client_of[one] == value for one in waiting) >= 40 - len(waiting)
                continue
            client_of[number] = value
            waiting.append(number)
        elif what == "end" and running:
            running.pop(value % len(running))
        elif what == "leave" and waiting:
            queue.remove(waiting.pop(value % len(waiting)))
        foreseen = queue.order(Counter(client_of[one] for one in running))
        assert sorted(foreseen) == waiting and len(queue) == len(waiting)
        while waiting and len(running) < slots:
            held = Counter(client_of[one] for one in running)
            chosen = queue.next(held)
            assert chosen == foreseen.pop(0)
            assert held[client_of[chosen]] == min(held[client_of[one]] for one in waiting)
            assert chosen == min(one for one in waiting if client_of[one] == client_of[chosen])
            waiting.remove(chosen)
            running.append(chosen)


@given(st.lists(st.integers(1, 30), min_size=20, max_size=60), st.lists(st.integers(1, 30), min_size=20, max_size=60))
def test_two_clients_who_always_wait_share_the_slots(first, second):
    """However long the answers of each are: from the second round on nobody holds two slots more than the other."""
    slots, time = 4, 0
    queue, ends = FairQueue(200), []
    for number, _ in enumerate(first):
        queue.add(number, "a")
    for number, _ in enumerate(second):
        queue.add(1000 + number, "b")
    while len(queue._waiting) == 2:
        held = Counter("a" if number < 1000 else "b" for _, number in ends)
        if len(ends) < slots:
            number = queue.next(held)
            ends.append((time + (first[number] if number < 1000 else second[number - 1000]), number))
            continue
        assert abs(held["a"] - held["b"]) <= 1
        ends.sort()
        time = ends.pop(0)[0]


def test_of_equals_the_one_that_waited_longest_for_its_turn_is_next():
    queue = FairQueue()
    for number, client in enumerate("aabbc"):
        queue.add(number, client)
    assert [queue.next({}) for _ in range(5)] == [0, 2, 4, 1, 3], "whatever they hold, for all hold the same"
    assert queue.next({}) is None


def test_who_makes_up_clients_gets_no_more_slots_than_who_does_not():
    """A device that relays tells the names of its clients, and a client that of its person."""
    queue, held = FairQueue(), Counter()
    clients = [f"device:mallory/{n}/{n}" for n in range(6)] + ["device:anna/1/", "192.168.1.7/bert", "192.168.1.7/cleo"]
    for number in range(18):
        queue.add(number, clients[number % 9])
    foreseen, given = queue.order(held), []
    for _ in range(18):
        given.append(queue.next(held))
        held[clients[given[-1] % 9]] += 1
    assert given == foreseen and sorted(given) == list(range(18))
    first = Counter(asker_of(clients[number % 9]) for number in given[:6])
    assert first == {"device:mallory": 2, "device:anna": 2, "192.168.1.7": 2}
    assert given[:6] == [0, 6, 7, 1, 15, 8], "and each client of theirs has its turn"


def test_slots_of_other_clients_of_who_asks_count():
    queue = FairQueue()
    for number, client in enumerate(("a/new", "b/old", "a/old")):
        queue.add(number, client)
    held = {"a/old": 1, "a/gone": 1, "b/old": 1}
    assert queue.order(held) == [1, 0, 2]
    assert [queue.next(held), queue.next(held), queue.next(held)] == [1, 0, 2]


def test_made_up_clients_leave_room_in_the_queue():
    queue = FairQueue(limit=30)
    for number in range(20):
        queue.add(number, f"device:mallory/{number}/")
    with pytest.raises(OverloadedError, match="20 answers of yours"):
        queue.add(20, "device:mallory/20/")
    for number in range(100, 105):
        queue.add(number, "device:anna/1/")
    with pytest.raises(OverloadedError, match="5 answers of yours"):
        queue.add(105, "device:anna/1/")
    queue.add(106, "device:bert/1/")
    for number in (*range(20), *range(100, 105), 106):
        queue.remove(number)
    assert not len(queue) and not queue._waiting


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("12")), max_size=40), st.integers(1, 5))
def test_the_order_is_that_in_which_slots_are_given(asks, slots):
    queue, held, client_of = FairQueue(100), Counter(), {}
    for number, (asker, client) in enumerate(asks):
        client_of[number] = f"{asker}/{client}"
        queue.add(number, client_of[number])
    for _ in range(min(slots, len(asks))):
        held[client_of[queue.next(held)]] += 1
    foreseen = queue.order(held)
    for number in foreseen:
        assert queue.next(held) == number
        askers = Counter()
        for client, count in held.items():
            askers[asker_of(client)] += count
        waiting = {asker_of(client_of[one]) for one in foreseen[foreseen.index(number) :]}
        assert askers[asker_of(client_of[number])] == min(askers[one] for one in waiting)
        held[client_of[number]] += 1
    assert queue.next(held) is None
