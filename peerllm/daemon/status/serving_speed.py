"""How fast a serving deployment is: sequences of a fixed length, started at once, told token by token."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, cast

from peerllm.daemon.facade import Chunk, GenerateRequest
from peerllm.daemon.facade_objects import MeasuredSpeed
from peerllm.errors import PeerLLMError
from peerllm.types import DeploymentId, Sampling

STRIDE = 7919  # between the ids of made-up prompts, so that no two are alike

_rounds = itertools.count(1)

Generate = Callable[[GenerateRequest], AsyncIterator[Chunk]]


async def measured(
    generate: Generate,
    deployment: DeploymentId,
    vocabulary: int,
    *,
    sequences: int,
    prompt: int,
    output: int,
    apart: bool = False,
) -> MeasuredSpeed:
    """`sequences` answers of exactly `output` tokens, greedy, to made-up prompts; milliseconds and tokens/s.

    They begin at once or, `apart`, each when the one before has its first token.
    `steady_tokens_per_second` counts the time in which every sequence was between its first and its last token.
    """
    started = time.perf_counter()
    client = f"bench {next(_rounds)}"  # one of its own: what an earlier round left in a slot is not taken up again

    begun = [asyncio.Event() for _ in range(sequences)]  # has its first token
    begins = [started] * sequences

    async def one(number: int) -> list[float]:
        ids = tuple((number * STRIDE + place * (number + 1)) % vocabulary for place in range(prompt))
        request = GenerateRequest(deployment, ids, output, Sampling(), client=client, ignore_stop=True)
        arrivals: list[float] = []
        if apart and number:
            await begun[number - 1].wait()
        begins[number] = time.perf_counter()
        async with aclosing(cast("Any", generate(request))) as chunks:
            async for chunk in chunks:
                arrivals += [time.perf_counter()] * len(chunk.ids)
                if arrivals:
                    begun[number].set()
        return arrivals

    tasks: list[asyncio.Task[list[float]]] = []
    try:
        async with asyncio.TaskGroup() as group:
            for number in range(sequences):
                tasks.append(group.create_task(one(number), name=f"bench {number}"))
    except* PeerLLMError as failures:
        raise failures.exceptions[0] from None
    all_arrivals = [task.result() for task in tasks]
    firsts = [arrivals[0] for arrivals in all_arrivals]
    lasts = [arrivals[-1] for arrivals in all_arrivals]
    count = sum(len(arrivals) for arrivals in all_arrivals)
    steps = [1000 * (b - a) / (output - 1) for a, b in zip(firsts, lasts, strict=True)] if output > 1 else []
    return {
        "sequences": sequences,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "time_to_first_token_ms": [1000 * (first - at) for first, at in zip(firsts, begins, strict=True)],
        "step_ms": steps,
        "tokens_per_second": count / (max(lasts) - started),
        "steady_tokens_per_second": _steady(all_arrivals, max(firsts), min(lasts)),
    }


def _steady(all_arrivals: list[list[float]], start: float, end: float) -> float | None:
    """None where the sequences were never all under way at one time."""
    inside = sum(start < at <= end for arrivals in all_arrivals for at in arrivals)
    return inside / (end - start) if end > start and inside else None
