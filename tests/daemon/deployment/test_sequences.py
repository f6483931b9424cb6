"""Sequences, tokens and their ends, with an engine that says only what a test makes it say."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from peerllm.daemon.decide.fair_queue import MAX_QUEUED
from peerllm.daemon.deployment import admission as module
from peerllm.daemon.deployment.admission import Admission, ServingCapacity
from peerllm.daemon.facade import GenerateRequest
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
    ("seconds", "expected"), [(6.0, 12.0), (1e6, module.RETRY_MOST_S), (1e-6, module.RETRY_LEAST_S)]
)
async def test_a_full_queue_says_when_those_who_wait_will_be_in(sequences, told, monkeypatch, seconds, expected):
    """Two slots, answers of 6 s: four who wait are in within 12 s. Never less than a second, nor more than a minute."""
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))  # the loop keeps its own
    monkeypatch.setattr(sequences, "_queue", module.FairQueue(8))  # half of it for one client
    assert sequences.retry_after_s == module.RETRY_UNKNOWN_S
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


async def test_an_interruption_is_an_honest_error_and_the_queue_waits(sequences, told):
    sequences.open(ServingCapacity(1, 100, 50, ()))
    running, queued = sequences.generate(ask()), sequences.generate(ask())
    first = await waiting(running)
    assert (await chunk(queued)).queued == 1
    sequences.interrupt("laptop is gone")
    with pytest.raises(EngineError, match="laptop is gone"):
        await first
    sequences.hear(Tokens(D, told.numbers(Submit)[0], 0, (9,)))  # late: nobody's any more
    after = await waiting(queued)
    sequences.open(ServingCapacity(1, 100, 50, ()))
    await asyncio.sleep(0)
    sequences.hear(Tokens(D, told.numbers(Submit)[1], 0, (4,), "stop"))
    assert (await asyncio.wait_for(after, BOUND_S)).ids == (4,)


async def test_patience_has_an_end(sequences, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.02)
    sequences.interrupt("two devices are missing")
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
    sequences.interrupt("a device is gone")
    later = sequences.generate(ask())
    assert (await chunk(later)).queued == 1, "it waits again"
    over = asyncio.get_running_loop().time() + 60.0
    assert sequences._patience is not None and abs(sequences._patience.when() - over) < 5.0
    timer = sequences._patience
    sequences.open(ServingCapacity(1, 100, 50, ()))
    assert timer.cancelled() and len(told.numbers(Submit)) == 1
    await later.aclose()
