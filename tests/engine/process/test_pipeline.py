"""The pipeline in virtual time: no bubbles, batches that part again, and the rates of the planner's formula."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from peerllm.types import ScheduleName, batches_of
from tests.engine.virtual import Ring, World
from tests.sizes import FULL

LAPS_UNTIL_EVEN = 3  # from the first tokens on
REACHED = 0.97  # of the formula
FREE = (0.0, 0.0)

RINGS = {
    "four alike": Ring((0, 1, 2, 3), ((1, 1),) * 4, ((0.2, 0.05),) * 4),
    "a slow one": Ring((0, 1, 2), ((1, 0.5), (4, 2), (1, 0.2)), ((0.5, 0.1),) * 3),
    "a slow link": Ring((0, 1, 2), ((1, 0.5),) * 3, ((0.2, 0), (3, 1), (0.2, 0))),
    "batches for free": Ring((0, 1, 2), ((5, 0.01), (4, 0.01), (6, 0.01)), ((0.5, 0),) * 3),
    "head on the source": Ring((0, 1, 2, 0), ((1, 0.5), (2, 1), (2, 1), (1, 0.4)), ((0.3, 0.1),) * 4),
    "slow head on the source": Ring((0, 1, 0), ((1, 0.5), (3, 1), (3, 0.5)), ((0.3, 0.1),) * 3),
    "long links": Ring((0, 1), ((1, 0.2), (1, 0.2)), ((9, 0), (9, 0))),
    "alone": Ring((0,), ((2, 0.5),), (FREE,)),
}


def formula(ring: Ring, count: int, size: int, many: int, schedule: ScheduleName = "no-bubble") -> float:
    """Tokens a millisecond; where batches cannot be equal, as if each took as long as the largest."""
    if schedule == "sequential":
        return 1 / ring.lap(1).ring_ms
    batches = batches_of(count, size, many)
    lap = ring.lap(-(-count // batches))
    if schedule == "bubble":
        return count / (lap.ring_ms + (batches - 1) * lap.bottleneck_ms)
    return count / batches / max(lap.bottleneck_ms, lap.ring_ms / batches)


@pytest.mark.parametrize("ring", RINGS.values(), ids=RINGS)
@pytest.mark.parametrize(("count", "size", "many"), [(8, 4, 2), (4, 4, 2), (8, 2, 4), (8, 1, 3), (6, 4, 4), (7, 4, 2)])
def test_started_at_one_instant_they_are_as_fast_as_apart(ring: Ring, count: int, size: int, many: int) -> None:
    together, apart = World(ring, 8, size, many), World(ring, 8, size, many)
    lap_ms = ring.lap(size).ring_ms
    for sequence in range(count):
        together.submit(sequence)
        apart.submit_at(sequence * lap_ms / count, sequence)
    together.run()
    apart.run()
    rate = together.rate(LAPS_UNTIL_EVEN)
    assert rate == pytest.approx(apart.rate(LAPS_UNTIL_EVEN), rel=0.03)
    assert rate >= REACHED * formula(ring, count, size, many)


def at_random(seed: int) -> tuple[Ring, int, int, int]:
    """A ring, how many sequences, micro-batch and micro-batches."""
    r = random.Random(seed)
    homes = list(range(r.randint(1, 5)))
    if len(homes) > 1 and r.random() < 0.5:
        homes.append(0)
    stages = tuple((r.uniform(0.2, 5), r.choice([0, r.uniform(0, 2)])) for _ in homes)
    hops = tuple((r.uniform(0, 4), r.choice([0, r.uniform(0, 0.5)])) for _ in homes)
    size, many = r.randint(1, 4), r.randint(1, 6)
    return Ring(tuple(homes), stages, hops), r.randint(1, 12), size, many


@pytest.mark.parametrize("schedule", ["no-bubble", "bubble", "sequential"])
def test_random_rings_reach_the_formula(schedule: ScheduleName) -> None:
    for seed in range(24 if FULL else 8):
        ring, count, size, many = at_random(seed)
        world = World(ring, count, size, many, schedule)
        for sequence in range(count):
            world.submit(sequence, answer=32)
        world.run()
        expected = formula(ring, count, size, many, schedule)
        rate = world.rate(LAPS_UNTIL_EVEN + 2)
        assert rate >= REACHED * expected, seed
        once = len(set(ring.homes)) == len(ring.homes)  # with two visits of a device a round may be shorter
        if schedule == "sequential" or (schedule == "bubble" and once and count % batches_of(count, size, many) == 0):
            assert rate == pytest.approx(expected, rel=0.01), seed


def test_no_stage_merges_or_splits_a_batch_of_steps() -> None:
    world = World(RINGS["head on the source"], 8, 4, 2)
    for sequence in range(8):
        world.submit_at(sequence * 1.7, sequence, prompt=2 + 3 * sequence, answer=30 + sequence)
    world.run()
    assert len(world.batches(0)) > 60
    for stage in (1, 2, 3):
        assert world.batches(stage) == world.batches(0)


def test_few_of_many_circle_apart() -> None:
    world = World(RINGS["four alike"], 8, 4, 2)
    for sequence in range(4):
        world.submit(sequence)
    world.run()
    assert {len(batch) for batch in world.batches()[6:]} == {2}


def test_those_that_end_and_start_leave_no_uneven_batches_for_long() -> None:
    """Answers of any length, a new one as soon as a slot is free: most batches are the even share of who decodes."""
    for seed in range(4):
        ring, _, size, many = at_random(seed)
        chance, slots = random.Random(seed), size * many
        world = World(ring, slots, size, many)
        left = iter(range(slots, slots + 60))

        def more(_: int, world: World = world, left=left, chance=chance) -> None:  # type: ignore[no-untyped-def]
            if (number := next(left, None)) is not None:
                world.submit(number, chance.randint(1, 40), chance.randint(20, 80))

        world.ended = more
        for sequence in range(slots):
            world.submit(sequence, chance.randint(1, 40), chance.randint(1, 80))
        world.run()
        assert len(world.ends) == slots + 60
        sizes = [len(batch) for batch in world.batches()]
        assert max(sizes) <= size
        busy = sizes[len(sizes) // 5 : -len(sizes) // 5]
        assert sum(busy) / len(busy) >= 0.7 * min(size, slots / many), seed


def test_nothing_starves() -> None:
    """Unbroken answers and endless new prompts beside each other: no token waits for many laps, no prompt for ever."""
    for schedule in ("no-bubble", "bubble", "sequential"):
        ring = RINGS["head on the source"]
        world = World(ring, 6, 2, 3, schedule)  # type: ignore[arg-type]
        for sequence in range(3):
            world.submit(sequence, answer=150)
        for number in range(3):
            world.submit(100 + number, prompt=300, answer=2)
        world.ended = lambda gone, world=world: (  # type: ignore[misc]
            world.submit(gone + 10, prompt=300, answer=2) if 100 <= gone < 160 else None
        )
        world.run()
        assert len(world.ends) == 3 + 3 * 7
        round_ms = 6 * ring.lap(2).ring_ms + 6 * 16 * ring.per_token * 4
        for sequence in range(3):
            times = world.tokens[sequence]
            assert max(b - a for a, b in pairwise(times)) < 3 * round_ms


def test_a_short_prompt_does_not_wait_for_the_long_ones_before_it() -> None:
    ring = RINGS["four alike"]
    world = World(ring, 8, 2, 4)
    for sequence in range(7):
        world.submit(sequence, prompt=3000, answer=2)
    world.submit_at(100.0, 7, prompt=8, answer=2)
    world.run()
    chunk_ms = 16 * ring.per_token
    under_way = 2 * 4  # chunks that the window holds
    assert world.tokens[7][0] - 100.0 < (under_way + 8) * chunk_ms + ring.lap(2).ring_ms
    firsts = [world.tokens[sequence][0] for sequence in range(7)]
    assert min(firsts) > 7 * 3000 * ring.per_token / 2  # all of them in turn


@pytest.mark.parametrize("schedule", ["no-bubble", "bubble", "sequential"])
def test_a_cancelled_sequence_holds_nobody_up(schedule: ScheduleName) -> None:
    world = World(RINGS["a slow one"], 6, 2, 3, schedule)
    for sequence in range(6):
        world.submit(sequence, prompt=20, answer=30)
    for sequence, at_ms in ((0, 3.0), (1, 40.0), (2, 41.5), (3, 77.7)):
        world.agenda.after(at_ms, lambda sequence=sequence: world.cancel(sequence))  # type: ignore[misc]
    world.run()
    assert {world.ends[sequence].finish for sequence in (0, 1, 2, 3)} == {"cancelled"}
    assert [len(world.tokens[sequence]) for sequence in (4, 5)] == [30, 30]
    assert not any(one.in_use for device in world.devices for one in device.deployment.rings[1].stages.values())
