"""What is told later is told: in order, after a short pass, before the thread waits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from peerllm.engine.messages import Done, FromEngine
from peerllm.engine.telling import SHORT_S, Telling

CALLS = st.lists(st.sampled_from(["now", "later", "short", "long", "flush"]), max_size=30)


@given(CALLS)
def test_nothing_is_lost_or_overtaken(calls: list[str]) -> None:
    told: list[FromEngine] = []
    telling = Telling(told.append)
    given_out = 0
    for call in calls:
        match call:
            case "now" | "later":
                message = Done(given_out)
                given_out += 1
                (telling if call == "now" else telling.later)(message)
            case "short" | "long":
                telling.computed(SHORT_S / 2 if call == "short" else SHORT_S)
            case _:
                telling.flush()
        if call != "later":
            assert len(told) == given_out
        assert told == [Done(number) for number in range(len(told))]
    telling.flush()
    assert len(told) == given_out


def test_only_while_passes_are_short() -> None:
    told: list[FromEngine] = []
    telling = Telling(told.append)
    telling.later(Done(1))
    assert told == [Done(1)], "no pass yet: nobody knows how long it takes"
    telling.computed(SHORT_S / 2)
    telling.later(Done(2))
    assert told == [Done(1)]
    telling.computed(2 * SHORT_S)
    assert told == [Done(1), Done(2)]
    telling.later(Done(3))
    assert told[-1] == Done(3)
