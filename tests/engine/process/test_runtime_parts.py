"""The pure parts: batching, sequences, slots, inbox, frames and back."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from peerllm.engine.base import Draw, Reach, Tensor
from peerllm.engine.messages import Submit
from peerllm.engine.process.data_links import most_under_way
from peerllm.engine.process.inbox import Inbox
from peerllm.engine.schedule.batching import STEPS_PER_CHUNK, Scheduler
from peerllm.engine.schedule.held_shard import HeldShard
from peerllm.engine.schedule.loaded_stage import MEASURED_SIZES, LoadedStage
from peerllm.engine.schedule.source_sequences import MAX_DRAINING, SourceSequences, window_tokens
from peerllm.engine.state.slot_table import SlotTable
from peerllm.engine.wire.parcels import (
    DTYPES,
    Drawn,
    Opened,
    Released,
    TokenBatch,
    from_frame,
    source_limits,
    stage_limits,
    to_frame,
)
from peerllm.errors import BadInputError, FrameError, OverloadedError
from peerllm.transport.frames.decoder import decode
from peerllm.transport.frames.token_run import TokenRun
from peerllm.transport.links.channels import FRAME_COST_BYTES
from peerllm.types import Sampling
from tests.engine.fakes import DEPLOYMENT, VOCABULARY, FakeBackend, FakeShard, stage
from tests.engine.runs import batch_of
from tests.engine.runs import sequences as of_whom
from tests.transport.frames_support import encode


def run(sequence: int, length: int = 1, position: int = 5, sample: bool = True) -> TokenRun:
    return TokenRun(sequence, sequence, position, length, sample)


def take(scheduler: Scheduler[str]) -> tuple[str, list[int]] | None:
    taken = scheduler.next()
    return None if taken is None else (taken[0], of_whom(taken[1]))


def test_steps_go_first_oldest_first_as_they_came() -> None:
    scheduler: Scheduler[str] = Scheduler()
    scheduler.add("a")
    scheduler.add("b")
    scheduler.put("a", batch_of(run(9, 8, 0, sample=False)))
    scheduler.put("b", batch_of(run(1), run(3), run(4)))
    scheduler.put("a", batch_of(run(2), run(6)))
    scheduler.put("b", batch_of(run(5)))
    scheduler.put("a", batch_of(run(7), run(8)))
    assert scheduler.waiting("a") == 12
    scheduler.drop("a", 7)
    assert take(scheduler) == ("b", [1, 3, 4])
    assert take(scheduler) == ("a", [2, 6])
    assert take(scheduler) == ("b", [5])
    assert take(scheduler) == ("a", [8])
    assert take(scheduler) == ("a", [9])
    assert take(scheduler) is None


def test_a_chunk_is_not_starved_and_never_overtaken_by_its_own_last_token() -> None:
    scheduler: Scheduler[str] = Scheduler()
    scheduler.add("a")
    scheduler.add("b")
    scheduler.put("b", batch_of(run(1, 8, 0, sample=False)))
    scheduler.put("b", batch_of(run(1, 1, 8)))
    order = []
    for _ in range(STEPS_PER_CHUNK + 2):
        scheduler.put("a", batch_of(run(2)))
        order.append(take(scheduler))
    assert order.index(("b", [1])) == STEPS_PER_CHUNK
    scheduler.drop("a", 2)
    assert take(scheduler) == ("b", [1])


def test_steps_count_against_a_chunk_only_while_it_waits() -> None:
    scheduler: Scheduler[str] = Scheduler()
    scheduler.add("a")
    for _ in range(2 * STEPS_PER_CHUNK):
        scheduler.put("a", batch_of(run(2)))
        take(scheduler)
    scheduler.put("a", batch_of(run(1, 8, 0, sample=False)))
    order = []
    for _ in range(STEPS_PER_CHUNK + 1):
        scheduler.put("a", batch_of(run(2)))
        order.append(take(scheduler))
    assert order.index(("a", [1])) == STEPS_PER_CHUNK


def test_each_chunk_is_a_batch_and_dropped_with_its_sequence() -> None:
    scheduler: Scheduler[str] = Scheduler()
    scheduler.add("a")
    for sequence, length in ((1, 3), (2, 5), (3, 2), (4, 8)):
        scheduler.put("a", batch_of(run(sequence, length, 0)))
    scheduler.drop("a", 3)
    assert take(scheduler) == ("a", [1])
    assert take(scheduler) == ("a", [2])
    assert take(scheduler) == ("a", [4])
    scheduler.remove("a")
    assert take(scheduler) is None


def submit(sequence: int, prompt: int, max_tokens: int = 5, stop: tuple[int, ...] = ()) -> Submit:
    return Submit(DEPLOYMENT, sequence, tuple(range(prompt)), max_tokens, stop, Sampling())


def test_the_window_bounds_what_is_under_way_and_cancelled_work_counts_until_it_has_left() -> None:
    sequences = SourceSequences(DEPLOYMENT, slots=3, context=1000, chunk=4, stages=2, vocabulary=VOCABULARY)
    assert window_tokens(2, 4) == 16
    sequences.submit(submit(1, 100))
    sequences.submit(submit(2, 100))
    feeds = sequences.feed()
    assert [(feed.sequence, feed.position) for feed in feeds] == [(1, 0), (2, 0), (1, 4), (2, 4)]  # round robin
    assert sequences.feed() == []
    assert sequences.end(1, "cancelled") is not None and sequences.end(1, "cancelled") is None
    assert sequences.feed() == []
    sequences.drained(1)
    sequences.drained(1)
    assert [feed.position for feed in sequences.feed()] == [8, 12]
    assert sequences.came_back(run(2, 4, 0), None) == (None, None)
    assert [feed.position for feed in sequences.feed()] == [16]
    assert sequences.came_back(run(1, 4, 0), None) == (None, None)  # late, of an ended sequence


@pytest.mark.parametrize(("chunk", "prompt"), [(chunk, prompt) for chunk in (3, 4, 8) for prompt in range(1, 20)])
def test_no_token_of_a_prompt_is_left_over_by_itself(chunk: int, prompt: int) -> None:
    sequences = SourceSequences(DEPLOYMENT, slots=1, context=1000, chunk=chunk, stages=20, vocabulary=VOCABULARY)
    sequences.submit(submit(1, prompt))
    feeds = sequences.feed()
    assert sequences.ids(feeds).tolist() == list(range(prompt))
    assert len(feeds) == -(-prompt // chunk)
    assert all(2 <= feed.length <= chunk for feed in feeds) or prompt == 1


CUTS = ((1, 8), (9, 2), (20, 4))


@pytest.mark.parametrize(
    ("prompt", "lengths"), [(8, [8]), (9, [2, 2, 2, 2, 1]), (19, [2] * 9 + [1]), (21, [4, 4, 4, 4, 3, 2])]
)
def test_a_prompt_is_cut_by_its_length_from_end_to_end(prompt: int, lengths: list[int]) -> None:
    sequences = SourceSequences(DEPLOYMENT, slots=1, context=1000, chunk=8, stages=20, vocabulary=VOCABULARY, cuts=CUTS)
    sequences.submit(submit(1, prompt))
    assert [feed.length for feed in sequences.feed()] == lengths


def test_what_a_slot_holds_already_does_not_count_for_the_cut() -> None:
    sequences = SourceSequences(
        DEPLOYMENT, slots=1, context=1000, chunk=8, stages=20, vocabulary=VOCABULARY, reach=Reach(True), cuts=CUTS
    )
    sequences.submit(submit(1, 20, 1))
    for feed in sequences.feed():
        sequences.came_back(feed, 77 if feed.sample else None)
    sequences.drained(1)
    sequences.submit(submit(2, 26))
    assert sequences.reused(2) == 20 and [feed.length for feed in sequences.feed()] == [6]


def test_a_long_prompt_in_small_chunks_leaves_room_for_others() -> None:
    """The window holds 32 tokens; the first prompt alone, in chunks of 4, has 4 of them under way."""
    sequences = SourceSequences(DEPLOYMENT, slots=3, context=1000, chunk=8, stages=2, vocabulary=VOCABULARY, cuts=CUTS)
    sequences.submit(submit(1, 100))
    assert [feed.position for feed in sequences.feed()] == [0, 4, 8, 12]
    assert sequences.feed() == [] and sequences.prompting
    sequences.submit(submit(2, 8))
    sequences.submit(submit(3, 100))
    assert [(feed.sequence, feed.length) for feed in sequences.feed()] == [(2, 8), (3, 4), (3, 4)]
    assert sequences.feed() == [], "the window is full"
    sequences.came_back(run(1, 4, 0), None)
    assert [(feed.sequence, feed.position) for feed in sequences.feed()] == [(1, 16)], "it kept its turn"
    sequences.came_back(run(1, 4, 4), None)
    assert [(feed.sequence, feed.position) for feed in sequences.feed()] == [(3, 8)]


@pytest.mark.parametrize(
    ("position", "length", "token"), [(4, 4, None), (0, 3, None), (0, 4, 7), (0, 0, None), (0, 8, None)]
)
def test_a_run_that_is_not_due_is_refused(position: int, length: int, token: int | None) -> None:
    sequences = SourceSequences(DEPLOYMENT, slots=1, context=1000, chunk=4, stages=2, vocabulary=VOCABULARY)
    sequences.submit(submit(1, 6))
    sequences.feed()
    with pytest.raises(FrameError):
        sequences.came_back(run(1, length, position), token)


def test_a_doubled_token_is_dropped() -> None:
    sequences = SourceSequences(DEPLOYMENT, slots=1, context=1000, chunk=4, stages=2, vocabulary=VOCABULARY)
    sequences.submit(submit(1, 2))
    sequences.feed()
    step, _ = sequences.came_back(run(1, 2, 0), 9)
    assert step is not None and (step.position, step.sample) == (2, True) and sequences.ids([step]).tolist() == [9]
    assert sequences.is_late(run(1, 2, 0)) and sequences.came_back(run(1, 2, 0), 9) == (None, None)
    with pytest.raises(FrameError):
        sequences.came_back(run(1, 1, 2), None)
    assert sequences.came_back(run(1, 1, 2), 8)[0] is not None


def test_an_answer_ends_where_the_context_is_full() -> None:
    sequences = SourceSequences(DEPLOYMENT, slots=1, context=10, chunk=8, stages=1, vocabulary=VOCABULARY)
    sequences.submit(submit(1, 8, max_tokens=9))
    (due,) = sequences.feed()
    for _ in range(2):
        step, told = sequences.came_back(due, 7)
        assert step is not None and told is not None and told.finish is None
        due = step
    assert due.position + due.length == 10
    step, told = sequences.came_back(due, 7)
    assert step is None and told is not None and (told.ids, told.finish) == ((7,), "length")


def test_what_was_reused_is_told_with_the_first_token_alone() -> None:
    reach = Reach(rewinds=True)
    sequences = SourceSequences(DEPLOYMENT, slots=1, context=99, chunk=8, stages=1, vocabulary=VOCABULARY, reach=reach)
    reused = []
    for number in (1, 2):
        sequences.submit(submit(number, 8, max_tokens=3))
        (due,) = sequences.feed()
        for _ in range(3):
            step, told = sequences.came_back(due, 7)
            assert told is not None
            reused.append(told.reused)
            due = step or due
        sequences.drained(number)
    assert reused == [0, 0, 0, 7, 0, 0]


def test_numbers_and_slots_in_use_are_refused() -> None:
    sequences = SourceSequences(DEPLOYMENT, slots=2, context=10, chunk=4, stages=1, vocabulary=VOCABULARY)
    assert [sequences.submit(submit(n, 3)) for n in (1, 2)] == [0, 1]
    with pytest.raises(BadInputError, match="in use"):
        sequences.submit(submit(1, 3))
    with pytest.raises(OverloadedError, match="slots"):
        sequences.submit(submit(3, 3))
    sequences.end(1, "cancelled")
    with pytest.raises(BadInputError, match="in use"):
        sequences.submit(submit(1, 3))
    assert sequences.submit(submit(4, 3)) == 0
    for number in range(5, 5 + MAX_DRAINING - 2):
        sequences.end(number - 1, "cancelled")
        sequences.submit(submit(number, 3))
    sequences.end(2, "cancelled")
    with pytest.raises(OverloadedError, match="leaving"):
        sequences.submit(submit(9999, 3))
    sequences.leave_behind(0)
    assert sequences.submit(submit(9999, 3)) == 1


def test_random_lives_never_exceed_the_window_or_lose_a_token() -> None:
    """A perfect pipeline of random delays: every prompt is fed whole and in order, every answer counts up."""
    for seed in range(30):
        chance = random.Random(seed)
        chunk, stages, slots = chance.randint(1, 6), chance.randint(1, 4), chance.randint(1, 5)
        cuts = ((1, chance.randint(1, chunk)), (chance.randint(2, 40), chance.randint(1, chunk)))
        sequences = SourceSequences(DEPLOYMENT, slots, 60, chunk, stages, VOCABULARY, cuts=chance.choice([(), cuts]))
        flying, ids, sizes = [], {}, {}
        number = 0
        for _ in range(300):
            if chance.random() < 0.2 and len(sequences.running) < slots:
                number += 1
                sizes[number] = chance.randint(1, 50)
                sequences.submit(submit(number, sizes[number], chance.randint(1, 20)))
                ids[number] = []
            for feed in sequences.feed():
                assert sequences.ids([feed]).tolist() == list(range(feed.position, feed.position + feed.length))
                assert feed.sample == (feed.position + feed.length == sizes[feed.sequence])
                flying.append(feed)
            prompts = [feed for feed in flying if feed.position < sizes[feed.sequence]]
            assert sum(feed.length for feed in prompts) <= window_tokens(stages, chunk)
            if flying and chance.random() < 0.8:
                feed = flying.pop(0)
                step, told = sequences.came_back(feed, chance.randint(0, 99) if feed.sample else None)
                if step is not None:
                    flying.append(step)
                if told is not None:
                    assert told.start == len(ids[feed.sequence])
                    ids[feed.sequence] += told.ids
                    if told.finish is not None:
                        sequences.drained(feed.sequence)
            elif sequences.running and chance.random() < 0.1:
                gone = chance.choice(sequences.running)
                sequences.end(gone, "cancelled")
                flying = [feed for feed in flying if feed.sequence != gone]
                sequences.drained(gone)
        assert number > 3


def test_slots() -> None:
    slots = SlotTable(2, 10)
    assert slots.enter(1, 0) == 0
    for missing in (2, -1):
        with pytest.raises(FrameError):
            slots.enter(2, missing)
    assert slots.extend(TokenRun(1, 0, 0, 4))
    for bad in ((1, 1, 4, 1), (1, 0, 5, 1), (1, 0, 4, 7), (1, 0, 4, 0)):
        with pytest.raises(FrameError):
            slots.extend(TokenRun(*bad))
    late = (1, 0, 0, 4), (2, 0, 4, 1), (2, 1, 0, 1)
    assert not any(slots.extend(TokenRun(*one)) for one in late), "it came twice, or of nobody"
    assert not slots.extend(TokenRun(1, 0, 4, 6), epoch=1), "of another epoch"
    assert slots.extend(TokenRun(1, 0, 4, 6))
    assert slots.release(1, epoch=1) is None and slots.release(1) == 0 and slots.release(1) is None
    assert slots.enter(2, 0) == 0
    assert slots.extend(TokenRun(2, 0, 0, 1))


def test_the_inbox_is_bounded_and_ends() -> None:
    inbox: Inbox[int] = Inbox(2)
    inbox.put(1)
    inbox.put(2)
    with pytest.raises(OverloadedError):
        inbox.put(3)
    inbox.put(4, always=True)
    assert inbox.take(wait=True) == [1, 2, 4] and inbox.take(wait=False) == []
    taken: list[object] = []
    thread = threading.Thread(target=lambda: taken.append(inbox.take(wait=True)))
    thread.start()
    inbox.put(5)
    thread.join(5)
    assert taken == [[5]]
    inbox.close()
    assert inbox.take(wait=True) is None
    with pytest.raises(OverloadedError):
        inbox.put(6, always=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parcels_survive_the_wire(dtype: str) -> None:
    spec = stage(1, stage=1, stages=3, dtype=dtype, context=100)
    into, back = stage_limits(spec, 4), source_limits(spec, 4)
    hidden = np.random.default_rng(1).standard_normal((6, 4)).astype(DTYPES[dtype])
    runs = [TokenRun(2**60, 3, 7, 2), run(1, 4, 90)]

    def through(parcel, limits, number):  # type: ignore[no-untyped-def]
        (came,) = from_frame(decode(encode(to_frame(parcel, DEPLOYMENT, 1, number)), limits))
        return came

    came = through(TokenBatch(runs, hidden), into, 1)
    assert list(came.runs) == runs and np.array_equal(came.rows, hidden) and came.rows.dtype == hidden.dtype
    sampling = Sampling(0.7, 0.123456789, 2**31 - 1, 0.05, 1.1, -2.0, 0.3, 2**63 - 1)
    assert through(Opened(5, 2, sampling), into, 1) == Opened(5, 2, sampling)
    assert through(Released(5, 2), into, 1) == Released(5, 2)
    long = through(Released(5, 2, "é" * 2000), back, 3)
    assert long.reason.startswith("é" * 250)
    drawn = through(Drawn(runs, [None, 2**40]), back, 3)
    assert list(drawn.runs) == runs and list(drawn.tokens) == [None, 2**40]


def test_an_id_below_the_one_that_stands_for_none_is_refused() -> None:
    frame = to_frame(Drawn([run(1), run(2)], [None, -2]), DEPLOYMENT, 1, 1)
    with pytest.raises(FrameError, match="-2 is no token id"):
        from_frame(frame)


@pytest.mark.parametrize(("chunk", "micro_batch"), [(2, 6), (6, 2)])
def test_a_link_carries_the_larger_of_a_chunk_and_a_batch_of_steps(chunk: int, micro_batch: int) -> None:
    limits = stage_limits(stage(1, stage=1, stages=2, slots=9, chunk=chunk, micro_batch=micro_batch), 4)

    def sent(*runs: TokenRun) -> None:
        rows = np.zeros((sum(run.length for run in runs), 4), np.float32)
        decode(encode(to_frame(TokenBatch(runs, rows), DEPLOYMENT, 1, 1)), replace(limits, max_bytes=10**6))

    sent(*(run(number) for number in range(micro_batch)))
    sent(run(0, chunk))
    with pytest.raises(FrameError, match="of more runs"):
        sent(*(run(number) for number in range(micro_batch + 1)))
    with pytest.raises(FrameError, match="of more tokens"):
        sent(run(0, 7))


def test_of_a_plans_stages_on_one_device_the_earlier_steps_first() -> None:
    scheduler: Scheduler[str] = Scheduler()
    scheduler.add("other", "other plan", 0)
    scheduler.add("head", "plan", 3)
    scheduler.add("start", "plan", 0)
    for place, sequence in (("head", 1), ("other", 2), ("start", 3), ("start", 4)):
        scheduler.put(place, batch_of(run(sequence)))
    assert take(scheduler) == ("start", [3])  # the plan's turn has come by its head's step
    assert take(scheduler) == ("start", [4])
    assert take(scheduler) == ("head", [1])
    assert take(scheduler) == ("other", [2])


def test_a_stage_tells_how_long_steps_take_and_how_far_that_varies() -> None:
    spec = stage(1)
    one = LoadedStage(spec, [HeldShard.of(spec, FakeShard(FakeBackend(), spec))], lambda logits, draws: [])
    step = [TokenRun(1, 0, 0, 1, True)]
    for seconds in (0.002, 0.004) * 40:
        one.paced(step, seconds)
    one.paced([TokenRun(1, 0, 0, 7, True)], 9.0)  # a prompt is not counted
    ((size, mean, spread),) = one.paces
    assert size == 1 and mean == pytest.approx(3, rel=0.1) and spread == pytest.approx(1 / 3, rel=0.1)


def test_a_stage_tells_of_the_sizes_of_batches_that_it_met_last() -> None:
    spec = stage(1)
    one = LoadedStage(spec, [HeldShard.of(spec, FakeShard(FakeBackend(), spec))], lambda logits, draws: [])

    def paced(size: int) -> None:
        one.paced([run(number) for number in range(size)], size / 1000)

    for size in range(1, MEASURED_SIZES + 1):
        paced(size)
    assert [size for size, _, _ in one.paces] == list(range(1, MEASURED_SIZES + 1))
    paced(1)
    paced(40)
    assert [size for size, _, _ in one.paces] == [1, *range(3, MEASURED_SIZES + 1), 40]
    assert one.mean_step_ms == pytest.approx(40)


def test_a_head_draws_for_the_position_after_a_run_and_forgets_a_released_answer() -> None:
    spec, drawn = stage(1), []

    def sampler(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
        drawn.extend((draw.position, list(draw.answer)) for draw in draws)
        return [7] * len(draws)

    one = LoadedStage(spec, [HeldShard.of(spec, FakeShard(FakeBackend(), spec))], sampler)
    one.open(Opened(3, 3, Sampling()))
    for batch in (batch_of(run(3, 5, 0)), batch_of(run(3, 1, 5))):
        result, failed = one.compute(batch)
        assert isinstance(result, Drawn) and list(result.tokens) == [7] and not failed
    assert drawn == [(5, []), (6, [7])]
    assert one.release(3) and not one._answers


@pytest.mark.parametrize(("stages", "chunk", "slots", "hidden"), [(2, 8, 4, 64), (8, 512, 1, 2048), (3, 1, 64, 8)])
def test_what_a_plan_lets_be_under_way_fits_a_links_queue(stages: int, chunk: int, slots: int, hidden: int) -> None:
    """However small the frames are that it comes in: a token each, beside the OPENs and the RELEASEs with reasons."""
    spec = stage(1, stages=stages, chunk=chunk, slots=slots, micro_batch=1, context=100)
    token = np.zeros((1, hidden), np.float32)
    step = to_frame(TokenBatch([run(1)], token), DEPLOYMENT, 1, 1)
    opened = to_frame(Opened(1, 0, Sampling()), DEPLOYMENT, 1, 1)
    released = to_frame(Released(1, 0, "x" * 512), DEPLOYMENT, 1, 1)
    sizes = [len(encode(frame)) + FRAME_COST_BYTES for frame in (step, opened, released)]
    under_way = (window_tokens(stages, chunk) + slots) * sizes[0] + slots * (sizes[1] + sizes[2])
    assert under_way <= most_under_way(spec, hidden) <= 2 * under_way
    rounded = most_under_way(stage(1, stages=stages, chunk=chunk, slots=slots, upstream_activations="int8"), hidden)
    assert rounded >= under_way, "what comes in rounded may go on exact"
