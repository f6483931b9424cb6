"""The answer to a request, as events: this device's own or another's, computed now or kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from aiohttp import web

from peerllm.api.core.answer_events import AnswerEvent, AnswerWaits
from peerllm.api.core.caller import Caller
from peerllm.api.core.generation import Generation
from peerllm.api.core.kept.answer_store import NotKeptError
from peerllm.api.core.kept.repeat import Repeat, fleeting
from peerllm.api.core.model_wait import awaited_model
from peerllm.api.core.named_models import find_model
from peerllm.api.core.own_answer import begun_answer, told
from peerllm.api.core.remote_answer import RemoteAnswer
from peerllm.api.error_answers import UnknownModelError
from peerllm.api.keys import ANSWERS, HOUSEHOLD
from peerllm.daemon.facade import ServedModel
from peerllm.errors import LinkError

RESUME_S = 60.0  # seconds in which an answer with a key is sought again after the device that gave it was lost
SOUGHT_S = 15.0  # the same of one without a key of which nothing has come: longer than another takes to follow
RETRY_S = 0.5  # seconds between two tries


async def answer(
    app: web.Application, wanted: Generation, caller: Caller, repeat: Repeat | None
) -> AsyncGenerator[AnswerEvent]:
    """By this device or by the model's source; when that is lost, who goes on is sought, and asked for the rest.

    Closing it cancels the sequence on every device, unless the client has a key.
    """
    until, shown, store = None, repeat or fleeting(wanted), app[ANSWERS]
    while store.find(shown.key, shown.fingerprint) is None:
        model: ServedModel | None = None
        async with aclosing(awaited_model(app, wanted.model, bool(caller.device))) as steps:
            async for step in steps:
                if isinstance(step, ServedModel):
                    model = step
                else:
                    yield step
        assert model is not None
        if not model.source:
            if store.find(shown.key, shown.fingerprint) is not None:
                break
            if shown.had is not None:
                raise NotKeptError("this answer is not kept any more; ask again without Last-Event-ID")
            if repeat is None:
                begun = await begun_answer(app, wanted, model, caller)
                async with aclosing(told(app, begun, begun.chunks, None)) as events:
                    async for event in events:
                        yield event
                return
            begin = begun_answer(app, wanted, model, caller, repeat)
            store.begin(repeat.key, repeat.fingerprint, caller.payer(wanted.user), begin, repeat.fleeting)
            break
        remote = RemoteAnswer(app[HOUSEHOLD], model, caller, shown, partial(_moved, app, model))
        try:
            async with aclosing(remote.events(wanted)) as events:
                async for event in events:
                    yield event
            return
        except LinkError as error:
            until = until or time.monotonic() + (SOUGHT_S if repeat is None and shown.had is None else RESUME_S)
            if time.monotonic() >= until:
                raise LinkError(f"no answer of {model.name} to its end: {error}; ask again in a moment") from error
        yield AnswerWaits(f"the device of {model.name} is lost, looking for the answer")
        await asyncio.sleep(RETRY_S)
    kept = store.find(shown.key, shown.fingerprint)
    assert kept is not None
    with store.reading(kept):
        begun = await kept.started()
        async with aclosing(told(app, begun, kept.chunks(), shown.had)) as events:
            async for event in events:
                yield event


def _moved(app: web.Application, model: ServedModel) -> bool:
    """Whether another device answers for it now."""
    try:
        return find_model(app, model.name).source != model.source
    except UnknownModelError:
        return False  # it may be listed again in a moment
