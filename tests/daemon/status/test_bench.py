"""Measuring a deployment: every sequence counted, the steady rate only while all are under way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from peerllm.daemon.facade import Chunk, GenerateRequest
from peerllm.daemon.status.serving_speed import _steady, measured


async def test_every_sequence_has_its_own_prompt_and_full_length() -> None:
    asked: list[GenerateRequest] = []

    async def generate(request: GenerateRequest) -> AsyncIterator[Chunk]:
        asked.append(request)
        yield Chunk((), queued=1)
        for token in range(request.max_tokens):
            yield Chunk((token,), "length" if token == request.max_tokens - 1 else None)

    found = await measured(generate, "d", 97, sequences=3, prompt=5, output=4)
    assert len({request.prompt for request in asked}) == 3
    assert all(len(request.prompt) == 5 and max(request.prompt) < 97 and request.ignore_stop for request in asked)
    assert len(found["time_to_first_token_ms"]) == len(found["step_ms"]) == 3
    assert found["tokens_per_second"] > 0


async def test_apart_each_begins_when_the_one_before_has_its_first_token() -> None:
    told: list[str] = []

    async def generate(request: GenerateRequest) -> AsyncIterator[Chunk]:
        told.append("begins")
        yield Chunk((), queued=1)
        await asyncio.sleep(0)  # others may begin
        told.append("first")
        yield Chunk((1,))
        yield Chunk((2,), "length")

    for apart in (True, False):
        told.clear()
        await measured(generate, "d", 97, sequences=3, prompt=5, output=2, apart=apart)
        assert (told == ["begins", "first"] * 3) == apart


@pytest.mark.parametrize(
    ("arrivals", "expected"),
    [
        ([[1.0, 2.0, 3.0], [2.0, 2.5, 3.5]], 2.0),  # between 2 and 3: the tokens at 2.5 and 3.0
        ([[1.0, 2.0], [2.0, 3.0]], None),  # never both under way
    ],
)
def test_the_steady_rate(arrivals: list[list[float]], expected: float | None) -> None:
    firsts, lasts = [one[0] for one in arrivals], [one[-1] for one in arrivals]
    assert _steady(arrivals, max(firsts), min(lasts)) == expected
