"""POST /v1/chat/completions, whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import aclosing

from aiohttp import web

from peerllm.api.error_answers import describe, json_response
from peerllm.api.fields import read_object
from peerllm.api.keys import HOUSEHOLD, TASKS, TEXTS
from peerllm.api.openai.answer import Completion, OpenAIObjects
from peerllm.api.openai.chat_request import ChatRequest, parse_chat
from peerllm.api.openai.model_wait import answering_model
from peerllm.api.peers.caller import Caller, caller_of
from peerllm.api.peers.remote_answer import pass_on
from peerllm.api.streams import KEEP_ALIVE_S, Stream, pulsed
from peerllm.api.text.stops import StopScanner
from peerllm.daemon.facade import Chunk, GenerateRequest, ServedModel
from peerllm.errors import EngineError, UnavailableError

CHAT_PATH = "/v1/chat/completions"


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """A client of this device asks; its answer may be another device's."""
    return await answer_chat(request.app, request, caller_of(request))


async def answer_chat(app: web.Application, request: web.Request, caller: Caller) -> web.StreamResponse:
    """Errors before the first sign of life have their own status; after it they are an error event, then the end."""
    chat = parse_chat(await read_object(request))
    stream = Stream(request, "text/event-stream; charset=utf-8") if chat.stream else None
    with app[TASKS].stream():
        try:
            model = await answering_model(app, chat.model, stream.comment if stream else _silently, bool(caller.device))
            if model.source:
                return await pass_on(app, request, CHAT_PATH, model, caller, stream)
            begun = await _begin(app, chat, model, caller)
            if stream is None:
                return await _whole(*begun)
            await _events(stream, *begun)
            return await stream.end()
        except asyncio.CancelledError:
            if stream is not None and stream.started and app[TASKS].closing:
                with contextlib.suppress(ConnectionError):
                    await stream.send(describe(UnavailableError("the answer broke off: this device is shutting down")))
                    await stream.end()
            raise


async def _begin(
    app: web.Application, chat: ChatRequest, model: ServedModel, caller: Caller
) -> tuple[AsyncIterator[Chunk], Completion, OpenAIObjects]:
    """Encodes the prompt and asks the model, which serves here."""
    assert model.model_dir is not None
    text = await app[TEXTS].model(model.deployment, model.model_dir)
    prompt = await app[TEXTS].prompt(text, chat.messages, model.context)
    room = model.context - len(prompt)
    wanted = GenerateRequest(
        deployment=model.deployment,
        prompt=prompt,
        max_tokens=min(chat.max_tokens or room, room),
        sampling=chat.sampling_with(text.defaults),
        client=caller.group(chat.user),
    )
    answer = Completion(text.detokenizer(frozenset(model.stop_ids)), StopScanner(chat.stops))
    objects = OpenAIObjects(model.name, len(prompt), chat.return_token_ids, chat.include_usage)
    return app[HOUSEHOLD].generate(wanted), answer, objects


async def _silently(_: str) -> None:
    """Nobody hears of progress before the answer."""


async def _whole(chunks: AsyncIterator[Chunk], answer: Completion, objects: OpenAIObjects) -> web.Response:
    pieces: list[str] = []
    async with aclosing(pulsed(chunks, KEEP_ALIVE_S)) as pulse:
        async for chunk in pulse:
            if chunk is not None:
                pieces.append(answer.feed(chunk.ids, chunk.finish, chunk.reused))
            if answer.finish:
                break
    if answer.finish is None:
        raise EngineError("the answer broke off without a reason; ask again")
    return json_response(objects.whole("".join(pieces), answer))


async def _events(stream: Stream, chunks: AsyncIterator[Chunk], answer: Completion, objects: OpenAIObjects) -> None:
    sent = 0  # token ids
    spoke = False
    async with aclosing(pulsed(chunks, KEEP_ALIVE_S)) as pulse:
        async for chunk in pulse:
            if chunk is None or (not chunk.ids and chunk.finish is None):
                queued = 0 if chunk is None else chunk.queued
                await stream.comment(f"queued {queued}" if queued else "working")
                continue
            text = answer.feed(chunk.ids, chunk.finish, chunk.reused)
            if not spoke:
                spoke = True
                await stream.send(objects.role())
            if text:
                await stream.send(objects.delta(text, answer.ids[sent:]))
                sent = len(answer.ids)
            if answer.finish:
                break
    if answer.finish is None:
        raise EngineError("the answer broke off without a reason; ask again")
    await stream.send(objects.finish(answer.finish, answer.ids[sent:]))
    if objects.with_usage:
        await stream.send(objects.usage(answer))
    await stream.write(b"data: [DONE]\n\n")
