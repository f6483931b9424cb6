"""POST /v1/chat/completions, whole or streamed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, cast

from aiohttp import web

from peerllm.api.error_answers import UnknownModelError, describe, json_response
from peerllm.api.fields import most_bytes, read_object
from peerllm.api.keys import ANSWERS, HOUSEHOLD, TASKS, TEXTS
from peerllm.api.openai.answer import Completion, OpenAIObjects
from peerllm.api.openai.answer_store import NotKeptError
from peerllm.api.openai.chat_request import ChatRequest, parse_chat
from peerllm.api.openai.inherited_answers import kept_of
from peerllm.api.openai.kept_answer import BegunAnswer, KeptAnswer
from peerllm.api.openai.model_wait import WaitingWords, answering_model
from peerllm.api.openai.models import find_model
from peerllm.api.peers.caller import Caller, caller_of
from peerllm.api.peers.remote_answer import RemoteAnswer
from peerllm.api.repeat import END, FLEETING_HEADER, DeviceLeavingError, Repeat, fleeting, repeat_of
from peerllm.api.streams import KEEP_ALIVE_S, Stream, pulsed
from peerllm.daemon.facade import Chunk, GenerateRequest, ServedModel
from peerllm.errors import EngineError, LinkError, UnavailableError
from peerllm.types import DeviceId

CHAT_PATH = "/v1/chat/completions"
RESUME_S = 60.0  # seconds in which an answer with a key is sought again after the device that gave it was lost
SOUGHT_S = 15.0  # the same of one without a key of which nothing has come: longer than another takes to follow
RETRY_S = 0.5  # seconds between two tries
LOOK_S = 0.5  # seconds without a token after which it is looked what an answer waits for


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """A client of this device asks; its answer may be another device's."""
    return await answer_chat(request.app, request, caller_of(request))


async def answer_chat(app: web.Application, request: web.Request, caller: Caller) -> web.StreamResponse:
    """Errors before the first sign of life have their own status; after it they are an error event, then the end."""
    with app[TASKS].stream(caller.asker, most_bytes(request)):
        return await _answer(app, request, caller)


async def _answer(app: web.Application, request: web.Request, caller: Caller) -> web.StreamResponse:
    fields = await read_object(request)
    chat, repeat = parse_chat(fields), repeat_of(request, fields.body)
    if repeat is not None:
        repeat.fleeting = bool(caller.device) and FLEETING_HEADER in request.headers
    stream = Stream(request, "text/event-stream; charset=utf-8") if chat.stream else None
    patient = Stream(request, "application/json") if caller.device and not chat.stream else None
    try:
        answer = await _answered(app, request, caller, chat, repeat, stream, fields.body)
        if patient is None or not patient.started or not isinstance(answer, web.Response):
            return answer
        await patient.write(bytes(cast("bytes", answer.body)))
        return await patient.end()
    except asyncio.CancelledError:
        if stream is not None and stream.started and app[TASKS].closing:
            with contextlib.suppress(ConnectionError):
                await stream.send(describe(DeviceLeavingError("the answer broke off: this device is shutting down")))
                await stream.end()
        raise


async def _answered(
    app: web.Application,
    request: web.Request,
    caller: Caller,
    chat: ChatRequest,
    repeat: Repeat | None,
    stream: Stream | None,
    body: Any,
) -> web.StreamResponse:
    """By this device or by the model's source; when that is lost, who goes on is sought, and asked for the rest."""
    until, asked = None, repeat or fleeting(body)
    while True:
        if (kept := app[ANSWERS].find(asked.key, asked.fingerprint)) is None:
            model = await answering_model(app, chat.model, stream.comment if stream else _silently, bool(caller.device))
            kept = app[ANSWERS].find(asked.key, asked.fingerprint)
            if kept is None and model.source:
                moved = partial(_moved, app, model.name, model.source)
                remote = RemoteAnswer(app[HOUSEHOLD], model, caller, asked, moved)
                try:
                    return await remote.pass_on(request, CHAT_PATH, stream)
                except LinkError as error:
                    resumed = repeat is not None or asked.last is not None
                    until = until or time.monotonic() + (RESUME_S if resumed else SOUGHT_S)
                    if time.monotonic() >= until or (remote.begun and not resumed):
                        text = f"no answer of {model.name} to its end: {error}; ask again in a moment"
                        raise LinkError(text) from error
                    if stream is not None:
                        await stream.comment(f"the device of {model.name} is lost, looking for the answer")
                await asyncio.sleep(RETRY_S)
                continue
            kept = kept or _kept(app, chat, model, caller, asked)
        try:
            return await _read(app, kept, chat, stream, asked, numbered=repeat is not None)
        except UnavailableError as error:  # the deployment ended here: whoever goes on with it goes on with the answer
            if not _moved(app, chat.model, ""):
                raise
            if caller.device:
                raise DeviceLeavingError(str(error)) from error
            await asyncio.sleep(RETRY_S)  # until that one has heard of it


def _moved(app: web.Application, model: str, source: DeviceId) -> bool:
    """Whether another device than the source answers for it now."""
    try:
        return find_model(app, model).source != source
    except UnknownModelError:
        return False  # it may be listed again in a moment


def _kept(app: web.Application, chat: ChatRequest, model: ServedModel, caller: Caller, asked: Repeat) -> KeptAnswer:
    """A new answer of a model that serves here."""
    if asked.last is not None:
        raise NotKeptError("this answer is not kept any more; ask again without Last-Event-ID")
    begin = _begin(app, chat, model, caller, asked)
    return app[ANSWERS].begin(asked.key, asked.fingerprint, caller.payer(chat.user), begin, asked.fleeting)


async def _read(
    app: web.Application, kept: KeptAnswer, chat: ChatRequest, stream: Stream | None, asked: Repeat, numbered: bool
) -> web.StreamResponse:
    with app[ANSWERS].reading(kept):
        begun = await kept.started()
        objects = replace(begun.objects, with_ids=chat.return_token_ids, with_usage=chat.include_usage)
        if stream is None:
            return await _whole(kept.chunks(), begun.completion(), objects)
        await _events(app, stream, kept.chunks(), begun.completion(), objects, asked, numbered)
        return await stream.end()


async def _begin(
    app: web.Application, chat: ChatRequest, model: ServedModel, caller: Caller, asked: Repeat
) -> BegunAnswer:
    """Encodes the prompt and asks the model, which serves here."""
    assert model.model_dir is not None
    text = await app[TEXTS].model(model.deployment, model.model_dir)
    prompt = await app[TEXTS].prompt(text, chat.messages, model.context, caller.asker)
    room = model.context - len(prompt)
    objects = OpenAIObjects(model.name, len(prompt), chat.return_token_ids, chat.include_usage)
    wanted = GenerateRequest(
        deployment=model.deployment,
        prompt=prompt,
        max_tokens=min(chat.max_tokens or room, room),
        sampling=chat.sampling_with(text.defaults),
        client=caller.group(chat.user),
        kept=kept_of(asked, caller.payer(chat.user), objects, chat.stops),
    )
    return BegunAnswer(app[HOUSEHOLD].generate(wanted), objects, text, frozenset(model.stop_ids), chat.stops)


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


async def _events(
    app: web.Application,
    stream: Stream,
    chunks: AsyncIterator[Chunk],
    answer: Completion,
    objects: OpenAIObjects,
    asked: Repeat,
    numbered: bool,
) -> None:
    """Events that the client has are not sent again; what it has of them is noted. `numbered`: they have ids."""

    async def tell(body: object, event_id: str) -> None:
        await stream.send(body, event_id if numbered else None)
        asked.last = event_id

    had, sent = asked.tokens, 0  # token ids
    words = WaitingWords(app, objects.model, stream)
    async with aclosing(pulsed(chunks, LOOK_S)) as pulse:
        async for chunk in pulse:
            if chunk is None:
                await words.nothing_came()
                continue
            if not chunk.ids and chunk.finish is None:
                await words.queued(chunk.queued)
                continue
            words.tokens_came()
            known = max(0, had - len(answer.ids))
            answer.feed(chunk.ids[:known], None)
            sent = max(sent, min(had, len(answer.ids)))
            text = answer.feed(chunk.ids[known:], chunk.finish, chunk.reused)
            if asked.last is None:
                await tell(objects.role(), "0")
            if text:
                await tell(objects.delta(text, answer.ids[sent:]), str(len(answer.ids)))
                sent = len(answer.ids)
            if answer.finish:
                break
    if answer.finish is None:
        raise EngineError("the answer broke off without a reason; ask again")
    if asked.last != END:
        await tell(objects.finish(answer.finish, answer.ids[sent:]), END)
    if objects.with_usage:
        await stream.send(objects.usage(answer))
    await stream.write(b"data: [DONE]\n\n")
