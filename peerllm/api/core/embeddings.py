"""The vectors of several texts, for a client of any API."""

from __future__ import annotations

import asyncio
import base64
import math
from array import array
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import orjson
from aiohttp import web

from peerllm.api.core.answer_events import AnswerEnds, Embedded
from peerllm.api.core.asking import answer
from peerllm.api.core.caller import Caller
from peerllm.api.core.generation import Generation
from peerllm.api.error_answers import FieldError
from peerllm.errors import EngineError, PeerLLMError

MAX_INPUTS = 2048  # of one request, as OpenAI has it
MAX_NUMBERS = 16 << 20  # of all vectors of one request: 64 MiB
AT_ONCE = 4  # of one request
_ITEM_BYTES = array("f").itemsize

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Vectors:
    """Of each input, in order; `tokens` of all of them."""

    model: str
    vectors: Sequence[array[float]]
    tokens: int


async def vectors_of(app: web.Application, wanted: Sequence[Generation], caller: Caller) -> Vectors:
    """A few at a time; the first that fails ends all."""
    found: list[tuple[Embedded, int] | None] = [None] * len(wanted)
    left, nbytes = iter(enumerate(wanted)), 0

    async def work() -> None:
        nonlocal nbytes
        for place, one in left:
            made = found[place] = await _vector(app, one, caller)
            nbytes += len(made[0].vector)
            if nbytes > MAX_NUMBERS * _ITEM_BYTES:
                raise FieldError(f"input: all vectors have more than {MAX_NUMBERS} numbers; send fewer texts", "input")

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(AT_ONCE, len(wanted))):
                group.create_task(work(), name="embed")
    except* PeerLLMError as errors:
        raise first(errors) from None
    made = [one for one in found if one is not None]
    vectors = [array("f", embedded.vector) for embedded, _ in made]
    return Vectors(made[0][0].model, vectors, sum(tokens for _, tokens in made))


def first(group: BaseExceptionGroup[PeerLLMError]) -> PeerLLMError:
    """One of the errors."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, PeerLLMError)
    return error


async def _vector(app: web.Application, wanted: Generation, caller: Caller) -> tuple[Embedded, int]:
    made: Embedded | None = None
    async with aclosing(answer(app, wanted, caller, None)) as events:
        async for event in events:
            match event:
                case Embedded():
                    made = event
                case AnswerEnds():
                    if made is not None and made.vector and len(made.vector) % _ITEM_BYTES == 0:
                        return made, event.usage.prompt_tokens
    raise EngineError("the model gave no vector; ask again")


def unit(vector: array[float], dimensions: int | None) -> Floats:
    """Of length 1, after all but the first `dimensions` numbers were left out; FieldError if there are fewer."""
    if dimensions is not None and dimensions > len(vector):
        raise FieldError(f"dimensions: the model's vectors have {len(vector)} numbers", "dimensions")
    kept = np.frombuffer(vector, np.float32)[:dimensions].astype(np.float64)
    length = math.sqrt(float(kept @ kept))
    return (kept / length if length else kept).astype(np.float32)


def as_json(vector: Floats) -> list[float]:
    """The numbers, written already: each vector by itself, so that others have their turn between two of them."""
    return cast("list[float]", orjson.Fragment(orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY)))


def as_base64(vector: Floats) -> str:
    """32-bit numbers, the least significant byte first."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
