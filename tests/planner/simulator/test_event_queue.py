"""Events in their order, and resources that wait for all that happens at an instant before they choose."""

from __future__ import annotations

from functools import partial

from peerllm.planner.simulator.event_queue import EventQueue, Resource


def test_events_of_one_instant_happen_as_they_were_entered() -> None:
    queue, seen = EventQueue(), list[tuple[float, str]]()
    for delay, name in ((2.0, "b"), (1.0, "a"), (2.0, "c")):
        queue.after(delay, partial(lambda name: seen.append((queue.now, name)), name))
    queue.run()
    assert seen == [(1.0, "a"), (2.0, "b"), (2.0, "c")]


def test_a_resource_chooses_among_all_that_ask_at_an_instant() -> None:
    """Also what comes to ask only by another event of that instant."""
    queue, served = EventQueue(), list[str]()
    resource = Resource(queue)

    def ask(name: str, rank: int) -> None:
        def granted() -> None:
            served.append(name)
            queue.after(5.0, resource.free)

        resource.ask(granted, (rank,))

    queue.after(1.0, partial(ask, "prompt", 1))
    queue.after(1.0, lambda: queue.after(0.0, partial(ask, "step", 0)))
    queue.after(1.0, partial(ask, "other prompt", 1))
    queue.run()
    assert served == ["step", "prompt", "other prompt"] and queue.now == 16.0
