"""Prompts of several clients are fed in turn."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peerllm.engine.messages import Submit
from peerllm.engine.schedule.prompt_turns import PromptTurns
from peerllm.engine.schedule.source_sequences import SourceSequences
from peerllm.types import Sampling
from tests.engine.fakes import DEPLOYMENT, VOCABULARY


def test_clients_take_turns_however_many_prompts_one_of_them_has() -> None:
    source = SourceSequences(DEPLOYMENT, slots=4, context=64, chunk=4, stages=4, vocabulary=VOCABULARY)
    for sequence, client in ((1, "a"), (2, "a"), (3, "a"), (4, "b")):
        source.submit(Submit(DEPLOYMENT, sequence, tuple(range(16)), 5, (), Sampling(), client=client))
    assert [feed.sequence for feed in source.feed()] == [1, 4, 2, 4, 3, 4, 1, 4], "b has half of the window"


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 20)), min_size=1, max_size=9),
    st.lists(st.tuples(st.integers(0, 8), st.booleans()), max_size=60),
)
def test_nobody_is_served_twice_before_another_once(
    waiting: list[tuple[str, int]], moves: list[tuple[int, bool]]
) -> None:
    """Between two turns of a client, every other that could have been served was."""
    turns, owner = PromptTurns(), {number: client for number, (client, _) in enumerate(waiting)}
    left = {number: 1 + count for number, (_, count) in enumerate(waiting)}
    for number, client in owner.items():
        turns.add(client, number)
    stuck: set[int] = set()
    since: dict[str, set[str]] = {}  # who was served since a client's last turn
    hindered: dict[str, set[str]] = {}  # who could not have been, at some time since
    for number, sticks in [*moves, *((9, False) for _ in range(sum(left.values())))]:
        (stuck.add if sticks else stuck.discard)(number)
        if number == 9:
            stuck.clear()
        able = {one for one in left if one not in stuck}
        for seen in hindered.values():
            seen |= {"a", "b", "c"} - {owner[one] for one in able}
        found = turns.next(able.__contains__)
        assert (found is None) == (not able)
        if found is None:
            continue
        client = owner[found]
        if client in since:
            assert {owner[one] for one in able} - {client} <= since[client] | hindered[client]
        for seen in since.values():
            seen.add(client)
        since[client], hindered[client] = set(), set()
        left[found] -= 1
        turns.served(client, found, more=left[found] > 0)
        if not left[found]:
            del left[found]
    assert not left and not turns
