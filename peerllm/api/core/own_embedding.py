"""The vector of a text, made by a model that is served here."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web

from peerllm.api.core.answer_events import AnswerEnds, AnswerEvent, Embedded, Usage
from peerllm.api.core.caller import Caller
from peerllm.api.core.generation import Generation
from peerllm.api.core.model_wait import LOOK_S, WaitingWords
from peerllm.api.error_answers import FieldError
from peerllm.api.keys import HOUSEHOLD, TEXTS
from peerllm.api.streams import pulsed
from peerllm.api.text.pooling_file import pooling_of
from peerllm.daemon.facade import GenerateRequest, ServedModel
from peerllm.errors import EngineError
from peerllm.types import Sampling

CUT_TIMES = 64  # a text is cut to the context after it was encoded, if that makes at most so many times its tokens


async def embedding(
    app: web.Application, wanted: Generation, model: ServedModel, caller: Caller
) -> AsyncGenerator[AnswerEvent]:
    """The vector, after words of what is done meanwhile."""
    assert model.model_dir is not None
    ids = await _ids(app, wanted, model, caller)
    request = GenerateRequest(
        deployment=model.deployment,
        prompt=ids,
        max_tokens=1,
        sampling=Sampling(),
        client=caller.group(wanted.user),
        pool=await asyncio.to_thread(pooling_of, model.model_dir),
        keep_alive_s=wanted.keep_alive_s,
    )
    words, vector = WaitingWords(app, model.name), array("f")
    async with aclosing(pulsed(app[HOUSEHOLD].generate(request), LOOK_S)) as chunks:
        async for chunk in chunks:
            if chunk is not None and chunk.finish is not None:
                vector = array("f", chunk.vector)
                break
            for note in words.nothing_came() if chunk is None else words.queued(chunk.queued):
                yield note
    if not vector:
        raise EngineError("the model gave no vector; ask again")
    yield Embedded(vector.tobytes(), model.name)
    yield AnswerEnds("stop", Usage(len(ids), 0))


async def _ids(app: web.Application, wanted: Generation, model: ServedModel, caller: Caller) -> list[int]:
    assert model.model_dir is not None
    text = await app[TEXTS].model(model.deployment, model.model_dir)
    most = model.context - 1
    if isinstance(wanted.prompt, str):
        if not wanted.prompt:
            raise FieldError("input is empty", "input")
        room = model.context * (CUT_TIMES if wanted.truncates else 1)
        try:
            ids = await app[TEXTS].prompt(text, wanted.prompt, room, caller.asker)
        except FieldError as error:
            raise FieldError(str(error), "input", error.code) from error
    else:
        ids = list(wanted.prompt)
        if not all(text.knows(one) for one in ids):
            raise FieldError("input has a token id that the model does not know", "input")
    if len(ids) > most and not wanted.truncates:
        what = f"the input has {len(ids)} tokens; the model's context holds {most} of them"
        raise FieldError(what, "input", "context_length_exceeded")
    if not ids:
        raise FieldError("input is empty", "input")
    return ids[:most]
