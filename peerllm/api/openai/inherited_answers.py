"""Answers with a key that another device began: this one goes on with them when that device is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import cast

import orjson
from aiohttp import web

from peerllm.api.keys import ANSWERS, HOUSEHOLD, TEXTS
from peerllm.api.openai.answer import OpenAIObjects
from peerllm.api.openai.kept_answer import BegunAnswer
from peerllm.api.repeat import MAX_KEY_CHARS, Repeat
from peerllm.daemon.facade import Chunk, GenerateRequest, InheritedAnswer, ServedModel
from peerllm.errors import PeerLLMError, UnavailableError
from peerllm.types import DeploymentId

MODEL_WAIT_S = 120.0  # seconds until the model must be served here
FORM = 1  # of what one device's API tells another's

log = logging.getLogger(__name__)


def kept_of(repeat: Repeat, payer: str, objects: OpenAIObjects, stops: Sequence[str]) -> str:
    """What another device's API needs besides tokens to go on with an answer."""
    told = {
        "form": FORM, "key": repeat.key, "fingerprint": repeat.fingerprint.hex(), "payer": payer, "stops": list(stops),
        "model": objects.model, "id": objects.id, "created": objects.created, "fleeting": repeat.fleeting,
    }  # fmt: skip
    return orjson.dumps(told).decode()


def go_on(app: web.Application, answer: InheritedAnswer) -> None:
    """Compute it to its end, and keep it for whoever shows its key; what cannot be gone on with is named in the log."""
    try:
        told = orjson.loads(answer.kept)
        key, fingerprint = str(told["key"])[:MAX_KEY_CHARS], bytes.fromhex(told["fingerprint"])
        objects = OpenAIObjects(
            str(told["model"]), len(answer.prompt), id=str(told["id"]), created=int(told["created"])
        )
        stops = [str(one) for one in told["stops"]]
        if told["form"] != FORM:
            raise ValueError("another form")
        if app[ANSWERS].find(key, fingerprint) is None:
            begin = _begin(app, answer, objects, stops)
            app[ANSWERS].begin(key, fingerprint, str(told["payer"]), begin, told["fleeting"] is True)
    except (PeerLLMError, LookupError, TypeError, ValueError) as error:
        log.warning("an answer that another device began is not gone on with: %s", error)


async def _begin(
    app: web.Application, answer: InheritedAnswer, objects: OpenAIObjects, stops: Sequence[str]
) -> BegunAnswer:
    model = await _model(app, answer.deployment)
    assert model.model_dir is not None
    text = await app[TEXTS].model(model.deployment, model.model_dir)
    wanted = GenerateRequest(
        deployment=answer.deployment,
        prompt=answer.prompt,
        max_tokens=answer.max_tokens,
        sampling=answer.sampling,
        client=answer.client,
        patience_s=MODEL_WAIT_S,
        answer=answer.ids,
        kept=answer.kept,
    )
    return BegunAnswer(_chunks(app, wanted), objects, text, frozenset(model.stop_ids), stops)


async def _chunks(app: web.Application, wanted: GenerateRequest) -> AsyncIterator[Chunk]:
    """All of it: what is known, then what comes."""
    if wanted.answer:
        yield Chunk(tuple(wanted.answer))
    async with aclosing(cast("AsyncGenerator[Chunk]", app[HOUSEHOLD].generate(wanted))) as chunks:
        async for chunk in chunks:
            yield chunk


async def _model(app: web.Application, deployment: DeploymentId) -> ServedModel:
    """Once it is known here; UnavailableError where it is not in time."""

    def found() -> ServedModel | None:
        here = (one for one in app[HOUSEHOLD].models() if one.deployment == deployment and not one.source)
        return next((one for one in here if one.model_dir is not None), None)

    try:
        async with asyncio.timeout(MODEL_WAIT_S):
            async with aclosing(cast("AsyncGenerator[None]", app[HOUSEHOLD].changed())) as changes:
                async for _ in changes:
                    if (model := found()) is not None:
                        return model
    except TimeoutError:
        pass
    raise UnavailableError("the model is not served here; ask again")
