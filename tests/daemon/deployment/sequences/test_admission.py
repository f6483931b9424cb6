"""Sequences, tokens and their ends, with an engine that says only what a test makes it say."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from peerllm.daemon.decide.fair_queue import MAX_QUEUED
from peerllm.daemon.deployment.sequences import admission as module
from peerllm.daemon.deployment.sequences import answer_times
from peerllm.daemon.deployment.sequences.admission import Admission
from peerllm.daemon.deployment.sequences.admitted_sequence import ServingCapacity
from peerllm.daemon.facade import Chunk, GenerateRequest
from peerllm.engine.messages import Cancel, Submit, Tokens
from peerllm.errors import BadInputError, EngineError, OverloadedError, UnavailableError
from peerllm.types import Sampling

D = "d" * 32
BOUND_S = 5


class Told(list):
    """What the engine was told."""

    def numbers(self, kind):
        return [message.sequence for message in self if isinstance(message, kind)]


@pytest.fixture
def told():
    return Told()


@pytest.fixture
async def sequences(told):
    made = Admission(D, told.append, lambda: None)
    yield made
    made.close("the test is over")


def ask(prompt=(1, 2, 3), most=5, client=""):
    return GenerateRequest(D, prompt, most, Sampling(), client)


async def chunk(stream):
    async with asyncio.timeout(BOUND_S):
        return await anext(stream)


async def waiting(stream):
    """A task that waits for the next chunk, at its wait."""
    task = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    return task


async def test_tokens_arrive_in_order_and_end(sequences, told):
    sequences.open(ServingCapacity(1, 100, 50, (7,)))
    stream = sequences.generate(ask())
    first = await waiting(stream)
    (submit,) = told
    assert submit == Submit(D, submit.sequence, (1, 2, 3), 5, (7,), Sampling(), "")
    sequences.hear(Tokens(D, submit.sequence, 0, (10,)))
    assert (await first).ids == (10,)
    sequences.hear(Tokens(D, submit.sequence, 1, (11,)))
    sequences.hear(Tokens(D, submit.sequence, 2, (12, 13), "length"))
    last = await chunk(stream)
    assert (last.ids, last.finish) == ((11, 12, 13), "length")
    with pytest.raises(StopAsyncIteration):
        await chunk(stream)
    assert not told.numbers(Cancel) and not sequences.running
    assert sequences.measured["time_to_first_token_ms"] >= 0 and sequences.measured["tokens_per_second"] > 0


async def test_a_slot_is_given_when_the_engine_says_so_not_when_the_client_leaves(sequences, told):
    sequences.open(ServingCapacity(1, 100, 50, ()))
    first, second = sequences.generate(ask()), sequences.generate(ask())
    task = await waiting(first)
    assert (await chunk(second)).queued == 1
    number = told.numbers(Submit)[0]
    sequences.hear(Tokens(D, number, 0, (1,)))
    await task
    await first.aclose()
    assert told.numbers(Cancel) == [number]
    assert told.numbers(Submit) == [number]  # the slot is still taken
    sequences.hear(Tokens(D, number, 1, (), "cancelled"))
    assert len(told.numbers(Submit)) == 2
    assert await chunk(second) == Chunk((), queued=0)
    after = await waiting(second)
    sequences.hear(Tokens(D, told.numbers(Submit)[1], 0, (5,), "stop"))
    assert (await after).ids == (5,)


async def test_a_silent_engine_does_not_keep_a_slot_for_ever(sequences, told, monkeypatch):
    monkeypatch.setattr(module, "CANCEL_CONFIRM_S", 0.01)
    sequences.open(ServingCapacity(1, 100, 50, ()))
    first, second = sequences.generate(ask()), sequences.generate(ask())
    (await waiting(first)).cancel()
    place = await waiting(second)
    await asyncio.wait({place}, timeout=BOUND_S)
    await first.aclose()
    task = await waiting(second)
    for _ in range(200):
        if len(told.numbers(Submit)) == 2:
            break
        await asyncio.sleep(0.01)
    assert len(told.numbers(Submit)) == 2
    task.cancel()


async def test_places_in_the_queue_are_told_as_they_change(sequences, told):
    sequences.open(ServingCapacity(1, 100, 50, ()))
    streams = [sequences.generate(ask(client=name)) for name in "abc"]
    running = await waiting(streams[0])
    assert [(await chunk(streams[1])).queued, (await chunk(streams[2])).queued] == [1, 2]
    third = await waiting(streams[2])
    sequences.hear(Tokens(D, told.numbers(Submit)[0], 0, (), "stop"))
    assert (await running).finish == "stop"
    assert (await asyncio.wait_for(third, BOUND_S)).queued == 1


async def test_the_queue_is_bounded(sequences):
    sequences.open(ServingCapacity(1, 100, 50, ()))
    streams = [sequences.generate(ask()) for _ in range(MAX_QUEUED // 2 + 2)]
    tasks = [await waiting(stream) for stream in streams]
    with pytest.raises(OverloadedError):
        await tasks[-1]
    for task in tasks[:-1]:
        task.cancel()
    await asyncio.wait(tasks)


async def test_a_client_that_leaves_the_queue_moves_the_others_up(sequences):
    sequences.open(ServingCapacity(1, 100, 50, ()))
    streams = [sequences.generate(ask(client=name)) for name in "abc"]
    running = await waiting(streams[0])
    assert [(await chunk(one)).queued for one in streams[1:]] == [1, 2]
    last = await waiting(streams[2])
    await streams[1].aclose()
    assert (await asyncio.wait_for(last, BOUND_S)).queued == 1
    running.cancel()


async def test_long_answers_do_not_keep_the_slots_from_a_client_with_short_ones(sequences, told):
    """One slot after the other is given back; who holds fewer gets it, whosever turn it would be."""
    sequences.open(ServingCapacity(4, 100, 50, ()))
    clients = dict(enumerate(["long"] * 10 + ["short"] * 10))
    tasks = [await waiting(sequences.generate(ask(prompt=(n + 1,), client=clients[n]))) for n in clients]
    running = [submit for submit in told if isinstance(submit, Submit)]
    assert [clients[submit.prompt[0] - 1] for submit in running] == ["long"] * 4
    for _ in range(2):  # two long answers end, then short ones only
        sequences.hear(Tokens(D, running.pop(0).sequence, 0, (), "stop"))
        running.append(told[-1])
    for _ in range(6):
        assert sorted(clients[submit.prompt[0] - 1] for submit in running) == ["long", "long", "short", "short"]
        sequences.hear(Tokens(D, running.pop(2).sequence, 0, (), "stop"))
        running.append(told[-1])
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


@pytest.mark.parametrize(
    ("seconds", "expected"), [(6.0, 12.0), (1e6, answer_times.RETRY_MOST_S), (1e-6, answer_times.RETRY_LEAST_S)]
)
async def test_a_full_queue_says_when_those_who_wait_will_be_in(sequences, told, monkeypatch, seconds, expected):
    """Two slots, answers of 6 s: four who wait are in within 12 s. Never less than a second, nor more than a minute."""
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))  # the loop keeps its own
    monkeypatch.setattr(sequences, "_queue", module.FairQueue(8))  # half of it for one client
    assert sequences.retry_after_s == answer_times.RETRY_UNKNOWN_S
    sequences.open(ServingCapacity(2, 100, 50, ()))
    first = await waiting(sequences.generate(ask()))
    now[0] += seconds
    sequences.hear(Tokens(D, told.numbers(Submit)[0], 0, (1,), "length"))
    assert (await first).finish == "length"
    streams = [sequences.generate(ask()) for _ in range(2 + 4)]
    tasks = [await waiting(stream) for stream in streams]
    with pytest.raises(OverloadedError, match=f"4 answers .* in {expected:.0f} s") as caught:
        await anext(sequences.generate(ask()))
    assert caught.value.retry_after_s == pytest.approx(expected)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_lengths_are_checked_and_clamped(sequences, told):
    sequences.open(ServingCapacity(2, 10, 50, ()))
    with pytest.raises(BadInputError, match=r"10 tokens.*fit 10"):
        await chunk(sequences.generate(ask(prompt=range(10))))
    with pytest.raises(BadInputError, match="outside"):
        await chunk(sequences.generate(ask(prompt=(1, 50))))
    for request in (ask(prompt=()), ask(most=0)):
        with pytest.raises(BadInputError):
            await chunk(sequences.generate(request))
    task = await waiting(sequences.generate(ask(prompt=range(7), most=99)))
    assert told[0].max_tokens == 3
    task.cancel()


async def test_who_waited_hears_that_it_has_a_slot(sequences, told):
    sequences.open(ServingCapacity(1, 100, 50, ()))
    first, second = sequences.generate(ask()), sequences.generate(ask())
    task = await waiting(first)
    assert (await chunk(second)).queued == 1
    after = await waiting(second)
    sequences.hear(Tokens(D, told.numbers(Submit)[0], 0, (1,), "stop"))
    assert (await task).ids == (1,)
    assert await asyncio.wait_for(after, BOUND_S) == Chunk((), queued=0), "before its prompt is computed"
    after = await waiting(second)
    sequences.hear(Tokens(D, told.numbers(Submit)[1], 0, (4,), "stop"))
    assert (await asyncio.wait_for(after, BOUND_S)).ids == (4,)


async def test_nothing_ends_while_the_deployment_is_held_and_the_engine_keeps_its_sequences(sequences, told):
    sequences.open(ServingCapacity(1, 100, 50, ()))
    running, queued = sequences.generate(ask()), sequences.generate(ask())
    first = await waiting(running)
    assert (await chunk(queued)).queued == 1
    sequences.hold("laptop is gone")
    number = told.numbers(Submit)[0]
    sequences.hear(Tokens(D, number, 0, (9,)))  # it was under way
    assert (await first).ids == (9,)
    second = await waiting(running)
    sequences.open(ServingCapacity(1, 100, 50, ()))
    assert told.numbers(Submit) == [number], "the engine has it"
    sequences.hear(Tokens(D, number, 0, (9, 4), "stop"))  # told again in part
    assert (await second).ids == (4,)
    assert await chunk(queued) == Chunk((), queued=0)
    after = await waiting(queued)
    sequences.hear(Tokens(D, told.numbers(Submit)[1], 0, (4,), "stop"))
    assert (await asyncio.wait_for(after, BOUND_S)).ids == (4,)


async def test_what_an_engine_took_with_it_is_given_to_the_next_where_it_stood(sequences, told):
    sequences.open(ServingCapacity(3, 100, 50, (7,)))
    streams = [sequences.generate(ask(prompt=(n,), most=20)) for n in (1, 2, 3)]
    tasks = [await waiting(stream) for stream in streams]
    numbers = told.numbers(Submit)
    sequences.hear(Tokens(D, numbers[1], 0, (10, 11)))
    assert (await tasks[1]).ids == (10, 11) and sorted(sequences.in_flight) == [1, 1, 3]
    sequences.hold("the engine crashed")
    sequences.hear(Tokens(D, numbers[0], 0, (), "error", "the engine is not running"))  # no answer's fault
    sequences.engine_lost()
    tasks[2].cancel()  # its client leaves meanwhile
    await asyncio.wait({tasks[2]})
    del told[:]
    sequences.open(ServingCapacity(3, 100, 50, (7,)))
    again = {submit.sequence: submit for submit in told if isinstance(submit, Submit)}
    assert again[numbers[1]] == Submit(D, numbers[1], (2,), 20, (7,), Sampling(), "", (10, 11))
    assert again[numbers[0]].answer == () and numbers[2] not in again
    task = await waiting(streams[1])
    sequences.hear(Tokens(D, numbers[1], 2, (12,), "length"))
    assert ((await task).ids, (await asyncio.wait({tasks[0]}, timeout=0))[0]) == ((12,), set())
    tasks[0].cancel()


async def test_fewer_slots_let_the_rest_wait_and_go_on_before_the_queue(sequences, told):
    sequences.open(ServingCapacity(2, 100, 50, ()))
    streams = [sequences.generate(ask(prompt=(n,), most=20)) for n in (1, 2, 3)]
    tasks = [await waiting(stream) for stream in streams[:2]]
    assert (await chunk(streams[2])).queued == 1
    numbers = told.numbers(Submit)
    for number in numbers:
        sequences.hear(Tokens(D, number, 0, (10,)))
    assert [(await task).ids for task in tasks] == [(10,), (10,)]
    sequences.suspend()
    assert told.numbers(Cancel) == numbers
    for number in numbers:
        sequences.hear(Tokens(D, number, 1, (), "cancelled"))
    sequences.open(ServingCapacity(1, 3, 50, ()))
    one = told[-1]
    assert (one.prompt, one.answer, one.max_tokens) == ((1,), (10,), 2) and one.sequence not in numbers
    task = await waiting(streams[0])
    sequences.hear(Tokens(D, one.sequence, 1, (11,), "length"))
    assert (await task).ids == (11,)
    other = told[-1]
    assert (other.prompt, other.answer) == ((2,), (10,)), "it had a slot before the third came"
    sequences.hear(Tokens(D, other.sequence, 1, (), "stop"))
    assert (await chunk(streams[1])).finish == "stop" and told[-1].prompt == (3,)
    third = await waiting(streams[2])
    third.cancel()


async def test_a_smaller_context_that_is_full_already_ends_the_answer_there(sequences, told):
    sequences.open(ServingCapacity(1, 100, 50, ()))
    stream = sequences.generate(ask(prompt=(1,), most=20))
    task = await waiting(stream)
    sequences.hear(Tokens(D, told[0].sequence, 0, (10, 11)))
    assert (await task).ids == (10, 11)
    sequences.suspend()
    sequences.hear(Tokens(D, told[0].sequence, 2, (), "cancelled"))
    sequences.open(ServingCapacity(1, 3, 50, ()))
    assert (await chunk(stream)).finish == "length" and len(told.numbers(Submit)) == 1


async def test_running_answers_wait_longer_than_the_queue_but_not_for_ever(sequences, told, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.01)
    monkeypatch.setattr(module, "RUNNING_PATIENCE_S", 0.05)
    sequences.open(ServingCapacity(1, 100, 50, ()))
    running, queued = sequences.generate(ask()), sequences.generate(ask())
    first = await waiting(running)
    assert (await chunk(queued)).queued == 1
    sequences.hold("two devices are missing")
    with pytest.raises(UnavailableError, match="two devices are missing"):
        await chunk(queued)
    assert not first.done()
    with pytest.raises(UnavailableError, match="two devices are missing"):
        await asyncio.wait_for(first, BOUND_S)
    assert told.numbers(Cancel) == told.numbers(Submit)


async def test_who_asks_to_wait_longer_does(sequences, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.01)
    sequences.hold("two devices are missing")
    impatient = sequences.generate(ask())
    assert (await chunk(impatient)).queued == 1
    with pytest.raises(UnavailableError):
        await chunk(impatient)
    patient = sequences.generate(replace(ask(), patience_s=60.0))
    assert (await chunk(patient)).queued == 1
    sequences.open(ServingCapacity(1, 100, 50, ()))
    await patient.aclose()


async def test_patience_has_an_end(sequences, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.02)
    sequences.hold("two devices are missing")
    stream = sequences.generate(ask())
    assert (await chunk(stream)).queued == 1
    with pytest.raises(UnavailableError, match="two devices are missing"):
        await chunk(stream)
    with pytest.raises(UnavailableError, match="two devices"):
        await chunk(sequences.generate(ask()))  # at once, the patience is spent


async def test_a_jump_in_the_tokens_ends_the_answer(sequences, told):
    sequences.open(ServingCapacity(1, 100, 50, ()))
    stream = sequences.generate(ask())
    task = await waiting(stream)
    number = told.numbers(Submit)[0]
    sequences.hear(Tokens(D, number, 1, (3,)))
    with pytest.raises(EngineError, match="jump"):
        await task
    assert told.numbers(Cancel) == [number]


async def test_an_error_of_the_engine_keeps_the_tokens_before_it(sequences, told):
    sequences.open(ServingCapacity(1, 100, 50, ()))
    stream = sequences.generate(ask())
    task = await waiting(stream)
    number = told.numbers(Submit)[0]
    sequences.hear(Tokens(D, number, 0, (3,)))
    sequences.hear(Tokens(D, number, 1, (), "error", "the link broke"))
    assert (await task).ids == (3,)
    with pytest.raises(EngineError, match="the link broke"):
        await chunk(stream)


async def test_closed_is_closed(sequences, told):
    sequences.open(ServingCapacity(1, 100, 50, ()))
    task = await waiting(sequences.generate(ask()))
    sequences.close("it was stopped")
    with pytest.raises(UnavailableError, match="it was stopped"):
        await task
    with pytest.raises(UnavailableError, match="it was stopped"):
        await chunk(sequences.generate(ask()))


async def test_what_was_reused_of_a_prompt_is_told_with_every_chunk(sequences, told):
    sequences.open(ServingCapacity(1, 100, 50, ()))
    stream = sequences.generate(ask(client="10.0.0.2/anna"))
    first = await waiting(stream)
    (submit,) = told
    assert submit.client == "10.0.0.2/anna"
    sequences.hear(Tokens(D, submit.sequence, 0, (10,), reused=2))
    assert (await first).reused == 2
    sequences.hear(Tokens(D, submit.sequence, 1, (11,), "length"))
    assert (await chunk(stream)).reused == 2


async def test_serving_ends_the_patience_and_the_next_interruption_begins_another(sequences, told, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.02)
    stream = sequences.generate(ask())
    assert (await chunk(stream)).queued == 1
    with pytest.raises(UnavailableError, match="loaded"):
        await chunk(stream)
    sequences.open(ServingCapacity(1, 100, 50, ()))
    monkeypatch.setattr(module, "PATIENCE_S", 60.0)
    sequences.hold("a device is gone")
    later = sequences.generate(ask())
    assert (await chunk(later)).queued == 1, "it waits again"
    sequences.open(ServingCapacity(1, 100, 50, ()))
    assert len(told.numbers(Submit)) == 1
    await later.aclose()


async def test_an_answer_that_gets_no_more_tokens_is_noticed_and_ends_after_some_tries(sequences, told, monkeypatch):
    monkeypatch.setattr(module, "STALL_S", 0.0)
    sequences.open(ServingCapacity(2, 100, 50, ()))
    stream, other = sequences.generate(ask()), sequences.generate(ask())
    task, _ = await waiting(stream), await waiting(other)
    number, prompting = told.numbers(Submit)
    assert not sequences.stalled(), "prompts take as long as they take"
    sequences.hear(Tokens(D, number, 0, (10,)))
    await task
    for _ in range(module.MAX_STALLS - 1):
        assert sequences.stalled()
    sequences.hear(Tokens(D, number, 1, (11,)))
    assert (await chunk(stream)).ids == (11,)
    for _ in range(module.MAX_STALLS):
        assert sequences.stalled(), "a token makes up for what was"
    assert not sequences.stalled() and told.numbers(Cancel) == [number]
    with pytest.raises(EngineError, match="no more tokens"):
        await chunk(stream)
    monkeypatch.setattr(module, "STALL_S", 60.0)
    sequences.hear(Tokens(D, prompting, 0, (10,)))
    assert not sequences.stalled()


async def test_log_probabilities_come_with_their_tokens_each_once(sequences, told):
    sequences.open(ServingCapacity(1, 100, 50, ()))
    stream = sequences.generate(replace(ask(), logprobs=2))
    first = await waiting(stream)
    (submit,) = told
    assert submit.logprobs == 2
    sequences.hear(Tokens(D, submit.sequence, 0, (10, 11), logprobs=(b"a", b"b")))
    found = await first
    assert (found.ids, found.logprobs) == ((10, 11), (b"a", b"b"))
    sequences.hear(Tokens(D, submit.sequence, 1, (11, 12), logprobs=(b"b", b"c")))
    sequences.hear(Tokens(D, submit.sequence, 3, (13,), "length", logprobs=(b"d",)))
    found = await chunk(stream)
    assert (found.ids, found.logprobs, found.finish) == ((12, 13), (b"c", b"d"), "length")


async def test_log_probabilities_of_what_came_before_an_error_are_told(sequences, told):
    sequences.open(ServingCapacity(1, 100, 50, ()))
    stream = sequences.generate(replace(ask(), logprobs=0))
    first = await waiting(stream)
    number = told.numbers(Submit)[0]
    sequences.hear(Tokens(D, number, 0, (10,), logprobs=(b"a",)))
    sequences.hear(Tokens(D, number, 1, (), "error", "broke"))
    found = await first
    assert (found.ids, found.logprobs) == ((10,), (b"a",))
