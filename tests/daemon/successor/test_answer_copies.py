"""Answers under way are copied to the device that would go on with them, in batches, and dropped when they are over."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from peerllm.codec import decode, encode
from peerllm.daemon.control_messages import AnswerCopied, AnswerGrew, Control
from peerllm.daemon.facade import Chunk, GenerateRequest
from peerllm.daemon.network.limits.message_sizes import MAX_BYTES
from peerllm.daemon.successor import answer_copies
from peerllm.daemon.successor.answer_copies import AnswerCopies, HeldCopies
from peerllm.errors import EngineError
from peerllm.logprobs import ENTRY_BYTES, MAX_ENTRIES
from peerllm.types import Sampling

DEPLOYMENT, OTHER = "d" * 32, "e" * 32
ASKED = GenerateRequest(DEPLOYMENT, (1, 2, 3), 9, Sampling(seed=5), client="me", kept="key and more")


class Source:
    """An answer that grows when it is told to; what its copies are told goes to `held` unless the link is down."""

    def __init__(self) -> None:
        self.told: list[tuple[str, object]] = []
        self.spoke = asyncio.Event()
        self.held: dict[str, HeldCopies] = {"b": HeldCopies(), "c": HeldCopies()}
        self.successor: str | None = "b"
        self.lost = False
        self.copies = AnswerCopies(self.tell, lambda _: self.successor)
        self.fed: asyncio.Queue[Chunk | Exception] = asyncio.Queue()

    def tell(self, device: str, message: AnswerCopied | AnswerGrew) -> None:
        self.told.append((device, message))
        self.spoke.set()
        if not self.lost:
            self.held[device].hear("a", message)

    async def chunks(self):
        while True:
            item = await self.fed.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if item.finish:
                return

    async def heard(self, request: GenerateRequest = ASKED) -> list[int]:
        return [one async for chunk in self.copies.copied(request, self.chunks()) for one in chunk.ids]

    async def feed(self, *ids: int, finish: str | None = None) -> None:
        self.fed.put_nowait(Chunk(ids, finish))
        for _ in range(4):  # turns of the loop until whoever waits for it has passed it on
            await asyncio.sleep(0)


@pytest.fixture
async def source(monkeypatch):
    monkeypatch.setattr(answer_copies, "FLUSH_S", 3600.0)
    made = Source()
    yield made
    made.copies.close()


def taken(held: HeldCopies, deployment: str = DEPLOYMENT):
    return held.take(deployment, OTHER)


async def test_a_copy_grows_with_the_answer_and_has_all_that_is_needed_to_go_on(source):
    task = asyncio.create_task(source.heard())
    await source.feed(7)
    source.copies.flush()
    await source.feed(8)
    await source.feed(9)
    source.copies.flush()
    source.copies.flush()
    assert [type(message) for _, message in source.told] == [AnswerCopied, AnswerGrew], (
        "batched; nothing new is no message"
    )
    (copy,) = taken(source.held["b"])
    assert list(copy.ids) == [7, 8, 9]
    assert (copy.deployment, copy.prompt, copy.max_tokens) == (OTHER, (1, 2, 3), 9)
    assert (copy.sampling, copy.client, copy.kept) == (ASKED.sampling, "me", "key and more")
    assert not taken(source.held["b"]), "taken once"
    await source.feed(finish="stop")
    assert await task == [7, 8, 9]


@pytest.mark.parametrize("end", ["finish", "error", "closed"])
async def test_an_answer_that_is_over_is_dropped_on_the_successor(source, end):
    task = asyncio.create_task(source.heard())
    await source.feed(7)
    source.copies.flush()
    if end == "finish":
        await source.feed(finish="stop")
    elif end == "error":
        source.fed.put_nowait(EngineError("broke"))
    else:
        task.cancel()
    await asyncio.wait({task})
    assert not taken(source.held["b"])


async def test_a_device_that_goes_down_leaves_its_answers_to_the_successor(source):
    task = asyncio.create_task(source.heard())
    await source.feed(7)
    source.copies.flush()
    source.copies.going = True
    task.cancel()
    await asyncio.wait({task})
    assert [list(one.ids) for one in taken(source.held["b"])] == [[7]]


async def test_another_successor_gets_all_of_it(source):
    source.successor = None
    task = asyncio.create_task(source.heard())
    await source.feed(7)
    source.copies.flush()
    assert not source.told
    source.successor = "b"
    source.copies.flush()
    await source.feed(8)
    source.successor = "c"
    source.copies.flush()
    (copy,) = taken(source.held["c"])
    assert list(copy.ids) == [7, 8]
    task.cancel()


async def test_what_a_successor_missed_leaves_a_beginning_and_is_told_anew(source):
    task = asyncio.create_task(source.heard())
    await source.feed(7)
    source.copies.flush()
    source.lost = True
    await source.feed(8)
    source.copies.flush()
    source.lost = False
    await source.feed(9)
    source.copies.flush()
    assert [list(one.ids) for one in taken(source.held["b"])] == [[7]], "no hole"
    source.copies.again("b")
    source.copies.flush()
    assert [list(one.ids) for one in taken(source.held["b"])] == [[7, 8, 9]]
    task.cancel()


async def test_an_answer_that_was_inherited_is_copied_with_what_was_known(source):
    request = GenerateRequest(DEPLOYMENT, (1,), 9, Sampling(), kept="key", answer=(4, 5))
    task = asyncio.create_task(source.heard(request))
    await source.feed(6)
    source.copies.flush()
    assert [list(one.ids) for one in taken(source.held["b"])] == [[4, 5, 6]]
    task.cancel()


async def test_ids_are_told_by_themselves_after_a_while(monkeypatch):
    monkeypatch.setattr(answer_copies, "FLUSH_S", 0.0)
    source = Source()
    task = asyncio.create_task(source.heard())
    async with asyncio.timeout(10):
        await source.feed(7)
        await source.spoke.wait()
    task.cancel()
    source.copies.close()


async def test_a_prompt_beyond_the_bound_is_not_copied(source, monkeypatch):
    monkeypatch.setattr(answer_copies, "MAX_PROMPT_TOKENS", 2)
    task = asyncio.create_task(source.heard())
    await source.feed(7)
    source.copies.flush()
    assert not source.told
    task.cancel()


def copied(number: int, tokens: int = 1, deployment: str = DEPLOYMENT) -> AnswerCopied:
    return AnswerCopied(deployment, str(number), (1,) * tokens, 9, Sampling(), "", "", ())


def test_the_oldest_copies_go_where_there_are_too_many(monkeypatch):
    monkeypatch.setattr(answer_copies, "MAX_COPIES", 6)
    held = HeldCopies()
    for number in range(5):
        held.hear("a", copied(number))
    assert len(taken(held)) == 3
    monkeypatch.setattr(answer_copies, "MAX_TOKENS", 20)
    for number in range(3):
        held.hear("a", copied(number, 4))
    assert len(taken(held)) == 2


def test_no_coordinator_takes_more_than_half_of_the_room(monkeypatch):
    """With new copies, with one that grows without end, or under the names of several deployments."""
    monkeypatch.setattr(answer_copies, "MAX_COPIES", 8)
    monkeypatch.setattr(answer_copies, "MAX_TOKENS", 80)
    held = HeldCopies()
    for number in range(3):
        held.hear("b", copied(number, deployment=OTHER))
    for number in range(20):
        held.hear("a", copied(number, deployment=f"{number % 2}" * 32))
    held.hear("a", copied(99))
    start = 0
    while start < 30:
        held.hear("a", AnswerGrew(DEPLOYMENT, "99", start, (7,) * 5))
        start += 5
    grown = taken(held)
    assert len(grown) == 1 and len(grown[0].ids) == 30
    held.hear("a", copied(99))
    for start in range(0, 200, 5):
        held.hear("a", AnswerGrew(DEPLOYMENT, "99", start, (7,) * 5))
    assert not taken(held), "it has grown beyond all bounds, and is no use"
    assert len(taken(held, OTHER)) == 3
    assert not any(taken(held, f"{n}" * 32) for n in (0, 1)), "its others made way"


def test_copies_of_one_deployment_are_not_anothers():
    held = HeldCopies()
    held.hear("a", copied(1))
    assert not taken(held, OTHER)
    held.forget(DEPLOYMENT)
    assert not taken(held)


WITH_LOGPROBS = replace(ASKED, logprobs=1)


def chunk(*ids: int, finish: str | None = None) -> Chunk:
    return Chunk(ids, finish, logprobs=tuple(bytes([one]) * 16 for one in ids))


async def test_log_probabilities_are_copied_with_their_ids_in_pieces(source, monkeypatch):
    monkeypatch.setattr(answer_copies, "WITH_LOGPROBS_AT_ONCE", 2)
    task = asyncio.create_task(source.heard(WITH_LOGPROBS))
    for ids in ((7, 8, 9), (10, 11)):
        source.fed.put_nowait(chunk(*ids))
        await source.feed()
        source.copies.flush()
    assert [type(one).__name__ for _, one in source.told] == ["AnswerCopied", *["AnswerGrew"] * 3]
    source.successor = "c"
    source.copies.flush()
    for held in source.held.values():
        (copy,) = taken(held)
        assert list(copy.ids) == [7, 8, 9, 10, 11] and list(copy.logprobs) == [bytes([one]) * 16 for one in copy.ids]
        assert copy.size == 3 + 5 * 3
    task.cancel()


async def test_a_long_answer_with_log_probabilities_is_copied_in_part(source, monkeypatch):
    monkeypatch.setattr(answer_copies, "MAX_WITH_LOGPROBS", 3)
    task = asyncio.create_task(source.heard(WITH_LOGPROBS))
    for ids in ((7, 8), (9, 10), (11,)):
        source.fed.put_nowait(chunk(*ids))
        await source.feed()
        source.copies.flush()
    (copy,) = taken(source.held["b"])
    assert list(copy.ids) == [7, 8, 9] and len(copy.logprobs) == 3
    task.cancel()


async def test_an_inherited_answer_is_copied_with_what_was_known_of_it(source):
    request = replace(WITH_LOGPROBS, answer=(4, 5), known_logprobs=(b"4" * 16, b"5" * 16))
    task = asyncio.create_task(source.heard(request))
    source.fed.put_nowait(chunk(6))
    await source.feed()
    source.copies.flush()
    (copy,) = taken(source.held["b"])
    assert (list(copy.ids), list(copy.logprobs)) == ([4, 5, 6], [b"4" * 16, b"5" * 16, b"\6" * 16])
    task.cancel()


def test_log_probabilities_of_other_tokens_or_sizes_are_left_out():
    held = HeldCopies()
    held.hear("a", copied(1))
    for start, ids, logprobs in (
        (0, (7,), (b"7" * 8,)),
        (1, (8,), ()),
        (1, (8,), (b"8" * 16,)),
        (1, (8,), (b"8" * 8, b"9" * 8)),
        (1, (8, 9), (b"8" * 8, b"9" * 16)),
        (1, (9,), (b"9" * 8,)),
    ):
        held.hear("a", AnswerGrew(DEPLOYMENT, "1", start, ids, logprobs=logprobs))
    (copy,) = taken(held)
    assert (list(copy.ids), list(copy.logprobs)) == ([7, 9], [b"7" * 8, b"9" * 8])


def test_a_copy_with_log_probabilities_fits_its_message():
    entries = b"\xff" * (MAX_ENTRIES * ENTRY_BYTES)
    grew = AnswerGrew(DEPLOYMENT, "a" * 32, 2**20, (2**31,) * answer_copies.WITH_LOGPROBS_AT_ONCE, logprobs=())
    whole = replace(grew, logprobs=(entries,) * len(grew.ids))
    assert len(encode(whole, Control)) < MAX_BYTES["AnswerGrew"]
    assert decode(encode(whole, Control), Control) == whole
