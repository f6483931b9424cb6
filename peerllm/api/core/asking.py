"""The answer to a request, as events: this device's own or another's, computed now or kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

import msgspec
from aiohttp import web

from peerllm.api.core.answer_events import AnswerEnds, AnswerEvent, AnswerWaits, Usage
from peerllm.api.core.caller import Caller
from peerllm.api.core.generation import Generation
from peerllm.api.core.kept.answer_store import NotKeptError
from peerllm.api.core.kept.repeat import DeviceLeavingError, Repeat, fleeting
from peerllm.api.core.model_wait import awaited_model
from peerllm.api.core.named_models import find_model
from peerllm.api.core.own_answer import begun_answer, counted, told
from peerllm.api.core.own_embedding import embedding
from peerllm.api.core.remote_answer import RemoteAnswer
from peerllm.api.error_answers import UnknownModelError
from peerllm.api.keys import ACCOUNTS, ANSWERS, HOUSEHOLD
from peerllm.daemon.facade import IDLE_MODEL, ServedModel
from peerllm.errors import EngineError, LinkError, UnavailableError
from peerllm.types import DeviceId

RESUME_S = 60.0  # seconds in which an answer with a key is sought again after the device that gave it was lost
SOUGHT_S = 15.0  # the same of one without a key of which nothing has come: longer than another takes to follow
RETRY_S = 0.5  # seconds between two tries


def answer(
    app: web.Application, wanted: Generation, caller: Caller, repeat: Repeat | None
) -> AsyncGenerator[AnswerEvent]:
    """By this device or by the model's source, counted for whoever asks; closing it cancels the sequence everywhere."""
    return app[ACCOUNTS].counted(caller, _answer(app, wanted, caller, repeat))


async def _answer(
    app: web.Application, wanted: Generation, caller: Caller, repeat: Repeat | None
) -> AsyncGenerator[AnswerEvent]:
    """By this device or by the model's source; when that is lost, who goes on is sought, and asked for the rest.

    When the device that computes it is lost, or gives the model to another, it goes on there. Closing it cancels the
    sequence on every device, unless the client has a key.
    """
    asked = repeat or fleeting(wanted)
    while True:
        try:
            async with aclosing(_sought(app, wanted, caller, asked, lasting=repeat is not None)) as events:
                async for event in events:
                    yield event
            return
        except (UnavailableError, UnknownModelError) as error:
            mistaken = caller.device and isinstance(error, UnknownModelError)  # that device may name the asking one
            if not _moved(app, wanted.model, "", *([caller.device] if mistaken else ())):
                raise
            if caller.device:  # which hears of the other device, too
                raise DeviceLeavingError(str(error)) from error
            await asyncio.sleep(RETRY_S)  # until that one has heard of it


async def _sought(
    app: web.Application, wanted: Generation, caller: Caller, asked: Repeat, lasting: bool
) -> AsyncGenerator[AnswerEvent]:
    """By the device that answers for the model now. `lasting`: the client has a key."""
    until, store = None, app[ANSWERS]
    unload = wanted.load_only and wanted.keep_alive_s == 0
    while True:
        if unload and not (there := find_model(app, wanted.model, bool(caller.device))).source:
            if there.state != IDLE_MODEL:
                await app[HOUSEHOLD].keep(there.deployment, 0.0)
            yield AnswerEnds("unload", Usage(0, 0))
            return
        if (kept := store.find(asked.key, asked.fingerprint)) is None:
            model: ServedModel | None = None
            async with aclosing(awaited_model(app, wanted.model, bool(caller.device))) as steps:
                async for step in steps:
                    if isinstance(step, ServedModel):
                        model = step
                    else:
                        yield step
            assert model is not None
            if wanted.load_only and not model.source:
                await app[HOUSEHOLD].keep(model.deployment, wanted.keep_alive_s)
                yield AnswerEnds("load", Usage(0, 0))
                return
            if wanted.counts and not model.source:
                yield await counted(app, wanted, model, caller)
                return
            if wanted.embeds and not model.source:
                async with aclosing(embedding(app, wanted, model, caller)) as events:
                    async for event in events:
                        yield event
                return
            kept = store.find(asked.key, asked.fingerprint)
            if kept is None and model.source:
                moved = partial(_moved, app, model.name, model.source)
                remote = RemoteAnswer(app[HOUSEHOLD], model, caller, asked, moved)
                try:
                    async with aclosing(remote.events(wanted)) as events:
                        async for event in events:
                            asked.note(event)
                            yield event
                    return
                except LinkError as error:
                    until = until or time.monotonic() + (RESUME_S if lasting or asked.had is not None else SOUGHT_S)
                    if time.monotonic() >= until:
                        what = f"no answer of {model.name} to its end: {error}; ask again in a moment"
                        raise LinkError(what) from error
                yield AnswerWaits(f"the device of {model.name} is lost, looking for the answer")
                await asyncio.sleep(RETRY_S)
                continue
            if kept is None and asked.had is not None:
                raise NotKeptError("this answer is not kept any more; ask again without Last-Event-ID")
            if kept is None:
                begin = begun_answer(app, wanted, model, caller, asked)
                kept = store.begin(asked.key, asked.fingerprint, caller.payer(wanted.user), begin, asked.fleeting)
        with store.reading(kept):
            begun = await kept.started()
            async with aclosing(told(app, begun, kept.chunks(), asked.had, asked.beyond)) as events:
                async for event in events:
                    asked.note(event)
                    yield event
        return


async def prompt_tokens(app: web.Application, wanted: Generation, caller: Caller) -> int:
    """Of its prompt, as the model's own device counts them; a model that does not run is started for that."""
    async with aclosing(answer(app, msgspec.structs.replace(wanted, counts=True), caller, None)) as events:
        async for event in events:
            if isinstance(event, AnswerEnds):
                return event.usage.prompt_tokens
    raise EngineError("the tokens were not counted; ask again")


def _moved(app: web.Application, model: str, *sources: DeviceId) -> bool:
    """Whether another device than these answers for it now."""
    try:
        return find_model(app, model).source not in sources
    except UnknownModelError:
        return False  # it may be listed again in a moment
