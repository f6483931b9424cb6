"""An answer of a model that is served here: from the request to its tokens, from its tokens to events."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from aiohttp import web

from peerllm.api.core.answer_events import AnswerBegins, AnswerEnds, AnswerEvent, Timings, Usage
from peerllm.api.core.caller import Caller
from peerllm.api.core.generation import SEED_BITS, Generation, OfferedTool, SamplingOptions
from peerllm.api.core.growing_answer import GrowingAnswer
from peerllm.api.core.kept.inherited_answers import kept_of
from peerllm.api.core.kept.kept_answer import BegunAnswer
from peerllm.api.core.kept.repeat import Repeat
from peerllm.api.core.model_wait import LOOK_S, WaitingWords
from peerllm.api.core.part_events import PartEvents
from peerllm.api.error_answers import FieldError
from peerllm.api.keys import HOUSEHOLD, TEXTS
from peerllm.api.streams import pulsed
from peerllm.api.text.text_store import AnswerText
from peerllm.daemon.facade import Chunk, GenerateRequest, ServedModel
from peerllm.engine.messages import FinishReason
from peerllm.errors import EngineError
from peerllm.types import Sampling


async def begun_answer(
    app: web.Application, wanted: Generation, model: ServedModel, caller: Caller, repeat: Repeat
) -> BegunAnswer:
    """Encodes the prompt and asks the model, which serves here."""
    text, prompt = await _encoded(app, wanted, model, caller)
    calls, grammar = wanted.calls(), ""
    if wanted.answer_form is not None or calls.keep:
        grammar = await app[TEXTS].grammar(text, wanted.answer_form, calls, text.opened(prompt))
    room = model.context - len(prompt)
    sampling = _sampling(wanted.sampling, text.defaults)
    drawn = sampling.temperature, sampling.top_p
    begins = AnswerBegins(secrets.token_hex(12), int(time.time()), model.name, len(prompt), *drawn)
    request = GenerateRequest(
        deployment=model.deployment,
        prompt=prompt,
        max_tokens=min(wanted.max_tokens or room, room),
        sampling=sampling,
        client=caller.group(wanted.user),
        keep_alive_s=wanted.keep_alive_s,
        kept=kept_of(repeat, caller.payer(wanted.user), begins, wanted, grammar),
        constraint=text.constraint(grammar),
        logprobs=wanted.logprobs,
    )
    chunks, silent = app[HOUSEHOLD].generate(request), frozenset(model.stop_ids)
    how = bool(wanted.messages), wanted.logprobs is not None, wanted.tells_ids
    return BegunAnswer(chunks, begins, text, silent, wanted.stops, prompt, calls, *how)


async def counted(app: web.Application, wanted: Generation, model: ServedModel, caller: Caller) -> AnswerEnds:
    """The prompt's tokens; nothing is computed."""
    _, prompt = await _encoded(app, wanted, model, caller)
    return AnswerEnds("stop", Usage(len(prompt), 0))


async def _encoded(
    app: web.Application, wanted: Generation, model: ServedModel, caller: Caller
) -> tuple[AnswerText, list[int]]:
    assert model.model_dir is not None
    text = await app[TEXTS].model(model.deployment, model.model_dir)
    if wanted.tools and not text.chats:
        raise FieldError(f"{model.name!r} does not support tools", "tools", "unsupported_parameter")
    if wanted.reasoning and not text.thinks:
        raise FieldError(f"{model.name!r} does not support thinking", "reasoning", "unsupported_parameter")
    return text, await _prompt(app, text, wanted, model.context, caller.asker)


async def _prompt(app: web.Application, text: AnswerText, wanted: Generation, context: int, asker: str) -> list[int]:
    if not all(text.knows(one) for one in wanted.after):
        raise FieldError("context has a token id that the model does not know", "context")
    if wanted.suffix and not text.fill_in:
        raise FieldError(f"{wanted.model!r} does not support insert", "suffix", "unsupported_parameter")
    if wanted.messages:
        messages = [msgspec.to_builtins(one) for one in wanted.messages]
        tools = [_function(tool) for tool in wanted.calls().tools]
        return await app[TEXTS].prompt(text, messages, context, asker, wanted.reasoning, tools, wanted.after)
    if isinstance(wanted.prompt, str):
        filled = text.fill_in.format(before=wanted.prompt, after=wanted.suffix) if wanted.suffix else wanted.prompt
        return await app[TEXTS].prompt(text, filled, context, asker, after=wanted.after)
    if not all(text.knows(one) for one in wanted.prompt):
        raise FieldError("prompt has a token id that the model does not know", "prompt")
    if not wanted.prompt:
        raise FieldError("the prompt is empty: send a text that the model can go on with", "prompt")
    if len(wanted.prompt) >= context:
        what = f"the prompt has {len(wanted.prompt)} tokens; the model's context holds {context}, answer included"
        raise FieldError(what, "prompt", "context_length_exceeded")
    return list(wanted.prompt)


def _function(tool: OfferedTool) -> dict[str, Any]:
    """As chat templates expect it."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def _sampling(options: SamplingOptions, defaults: Mapping[str, float]) -> Sampling:
    """What the client said, else the model's defaults; a random seed if none was given."""
    chosen: dict[str, Any] = {"seed": secrets.randbits(SEED_BITS), **defaults, **options.said()}
    return Sampling(**chosen)


async def told(
    app: web.Application, begun: BegunAnswer, chunks: AsyncIterator[Chunk], had: int | None, beyond: int = 0
) -> AsyncGenerator[AnswerEvent]:
    """`chunks` as events; what the first `had` tokens complete is left out, and so many events `beyond`."""
    answer, begins, since, first = begun.growing(), False, time.monotonic(), 0.0
    known = had or 0
    parts = PartEvents(begun.begins.id)
    words = WaitingWords(app, begun.begins.model)
    async with aclosing(pulsed(chunks, LOOK_S)) as pulse:
        async for chunk in pulse:
            if chunk is None or (not chunk.ids and chunk.finish is None):
                for note in words.nothing_came() if chunk is None else words.queued(chunk.queued):
                    yield note
                continue
            words.tokens_came()
            if not begins:
                begins, first = True, time.monotonic()
                yield begun.begins
            skipped = max(0, known - len(answer.ids))
            for _ in parts.of(answer.feed(chunk.ids[:skipped], None, 0, chunk.logprobs), answer.ids):
                pass
            parts.sent = max(parts.sent, min(known, len(answer.ids)))
            for ids, logprobs, finish in _parts(answer, chunk, skipped):
                for event in parts.of(answer.feed(ids, finish, chunk.reused, logprobs), answer.ids):
                    if beyond > 0:
                        beyond -= 1
                    else:
                        yield event
            if answer.finish:
                break
    if answer.finish is None:
        raise EngineError("the answer broke off without a reason; ask again")
    usage = Usage(begun.begins.prompt_tokens, len(answer.ids), answer.reused)
    timings = Timings(first - since, time.monotonic() - first)
    ids = tuple(answer.ids[parts.sent :])
    yield AnswerEnds(answer.finish, usage, ids, answer.scanner.found, timings, parts.calls, begun.all_ids(answer.ids))


def _parts(
    answer: GrowingAnswer, chunk: Chunk, at: int
) -> Iterator[tuple[Sequence[int], Sequence[bytes], FinishReason | None]]:
    """Of a chunk from there on: token by token where there may be more than words, so that few come with the same one.

    Also where they are told with their log probabilities, of which an event has few.
    """
    while at < len(chunk.ids) - 1 and not (answer.reader.done and answer.places is None):
        yield chunk.ids[at : at + 1], chunk.logprobs[at : at + 1], None
        at += 1
    yield chunk.ids[at:], chunk.logprobs[at:], chunk.finish
