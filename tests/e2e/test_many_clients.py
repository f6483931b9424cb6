"""Two hundred clients at once on the demo's household: every answer whole and right; a full queue says so."""

from __future__ import annotations

import asyncio

import pytest

from peerllm.cli.demo.demo import SLOTS
from peerllm.daemon.decide.fair_queue import MAX_QUEUED
from peerllm.daemon.deployment.sequences.answer_times import RETRY_LEAST_S, RETRY_MOST_S
from tests.clients import Heard, clients, stream
from tests.household import Device

CLIENTS = 200
QUESTIONS = ("What are you?", "Tell me a story.", "Hello!", "What is 3 plus 4?", "Who is there?")
LENGTHS = (4, 5, 6, 8)  # tokens of an answer
LONG = 900  # tokens: far from over while the queue fills
STORY = "Tell me a story."
OVER = 5  # clients more than there is room for


@pytest.mark.timeout(240)
async def test_two_hundred_streams_and_none_is_lost(demo: list[Device]) -> None:
    asked = [(QUESTIONS[n % len(QUESTIONS)], LENGTHS[n % len(LENGTHS)]) for n in range(CLIENTS)]
    async with clients(demo[0].url, demo[0].token()) as session:
        alone = {question: await stream(session, question, max(LENGTHS)) for question in QUESTIONS}
        heard = await asyncio.gather(*(stream(session, *one) for one in asked))
    for (question, length), one in zip(asked, heard, strict=True):
        right = alone[question].ids[:length]
        assert (one.status, one.error, one.ids, one.done) == (200, {}, right, True)
        assert one.finish == ("stop" if len(right) < length else "length")
        assert one.places == sorted(one.places, reverse=True)  # nobody overtakes within one client
    assert alone[STORY].text.startswith(heard[1].text) and heard[1].text
    assert any(one.places for one in heard)


@pytest.mark.timeout(240)
async def test_who_finds_the_queue_full_is_told_when_to_come_back(demo: list[Device]) -> None:
    async with clients(demo[0].url, demo[0].token()) as session:
        line = MAX_QUEUED // 2  # the rest of the queue is kept for other clients
        room = SLOTS + line
        asks = [asyncio.create_task(stream(session, STORY, LONG)) for _ in range(room + OVER)]
        refused: list[Heard] = []
        for ask in asyncio.as_completed(asks):
            refused.append(await ask)
            if len(refused) == OVER:
                break
        for one in refused:
            assert one.status == 429
            assert RETRY_LEAST_S <= int(one.headers["Retry-After"]) <= RETRY_MOST_S
            assert one.error["type"] == "rate_limit_error"
            assert f"{line} answers of yours are waiting" in one.error["message"]
        for ask in asks:
            ask.cancel()
        ended = await asyncio.gather(*asks, return_exceptions=True)
        assert sum(isinstance(one, asyncio.CancelledError) for one in ended) == room
        again = await stream(session, "What are you?", 8)  # who hung up holds nobody up
        assert (again.status, len(again.ids), again.done) == (200, 8, True)
