"""Questions between devices, without a link: numbers, bounds, and counters that must come back to nothing."""

from __future__ import annotations

import asyncio

import pytest

from peerllm.daemon.control_messages import Answer, Ask, Release
from peerllm.daemon.network import asks as module
from peerllm.daemon.network.asks import Asks
from peerllm.errors import LinkError, OverloadedError, RefusedError

A, B = "a" * 64, "b" * 64
QUESTION = Release("d" * 32, 1)
BOUND_S = 10.0


class Sent(list[tuple[str, Ask | Answer]]):
    """What was sent, waited for."""

    def __init__(self) -> None:
        self.news = asyncio.Event()

    def send(self, device: str, message: Ask | Answer) -> None:
        self.append((device, message))
        self.news.set()

    async def count(self, number: int) -> None:
        async with asyncio.timeout(BOUND_S):
            while len(self) < number:
                self.news.clear()
                await self.news.wait()


@pytest.fixture
def sent() -> Sent:
    return Sent()


async def test_a_device_has_so_many_questions_answered_at_once_and_others_their_own(
    sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ANSWERING", 3)
    asks, gate = Asks(sent.send), asyncio.Event()

    async def answer(device: str, question: object) -> Answer:
        await gate.wait()
        return Answer(0)

    asks.answer_with(answer)
    for number in range(1, 5):
        asks.asked(A, Ask(number, QUESTION))
    assert [(device, one.number, one.error) for device, one in sent] == [(A, 4, "OverloadedError")]  # type: ignore[union-attr]
    asks.asked(B, Ask(1, QUESTION))
    assert len(sent) == 1, "another device's question is taken"
    gate.set()
    await sent.count(5)
    await asyncio.sleep(0)  # the tasks' ends are counted one turn later
    assert not asks._load and not asks._answering
    for number in range(5, 8):
        asks.asked(A, Ask(number, QUESTION))
    await sent.count(8)
    assert sum(one.error == "OverloadedError" for _, one in sent) == 1  # type: ignore[union-attr]
    await asks.close()


async def test_so_many_questions_may_be_open_and_one_answered_makes_room(
    sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 2)
    asks = Asks(sent.send)
    first, second = (asyncio.ensure_future(asks.ask(A, QUESTION, BOUND_S)) for _ in range(2))
    await sent.count(2)
    with pytest.raises(OverloadedError):
        await asks.ask(B, QUESTION, BOUND_S)
    numbers = [message.number for _, message in sent]
    assert len(set(numbers)) == 2
    asks.answered(B, Answer(numbers[0]))
    assert not first.done(), "who was not asked answers nothing"
    asks.answered(A, Answer(numbers[0], free_bytes=7))
    assert (await first).free_bytes == 7
    third = asyncio.ensure_future(asks.ask(B, QUESTION, BOUND_S))
    await sent.count(3)
    asks.answered(A, Answer(numbers[0]))  # again: nobody waits for it
    asks.vanished(A, "gone")
    with pytest.raises(LinkError, match="gone"):
        await second
    assert not third.done()
    asks.answered(B, Answer(sent[2][1].number, "RefusedError", "no", 5))
    with pytest.raises(RefusedError, match="no") as refused:
        await third
    assert refused.value.free_bytes == 5  # type: ignore[attr-defined]
    assert not asks._waiting
    await asks.close()


async def test_whoever_waits_hears_of_silence_and_of_the_end(sent: Sent) -> None:
    asks = Asks(sent.send)
    with pytest.raises(LinkError, match=r"did not answer Release within 0\.01 s"):
        await asks.ask(A, QUESTION, 0.01)
    waiting = asyncio.ensure_future(asks.ask(A, QUESTION, BOUND_S))
    await sent.count(2)
    await asks.close()
    with pytest.raises(LinkError, match="going down"):
        await waiting


async def test_a_question_that_cannot_be_sent_is_not_waited_for() -> None:
    def away(device: str, message: object) -> None:
        raise LinkError("it is away")

    asks = Asks(away)
    with pytest.raises(LinkError, match="away"):
        await asks.ask(A, QUESTION, BOUND_S)
    assert not asks._waiting
