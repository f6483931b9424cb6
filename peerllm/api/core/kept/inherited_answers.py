"""Answers with a key that another device began: this one goes on with them when that device is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Annotated, Literal, cast

import msgspec
from aiohttp import web
from msgspec import Meta, Struct

from peerllm.api.core.answer_events import AnswerBegins
from peerllm.api.core.generation import CallsWanted, Generation, TopLogprobs
from peerllm.api.core.kept.kept_answer import BegunAnswer
from peerllm.api.core.kept.repeat import MAX_KEY_CHARS, Repeat
from peerllm.api.keys import ANSWERS, HOUSEHOLD, TEXTS
from peerllm.daemon.facade import Chunk, GenerateRequest, InheritedAnswer, ServedModel
from peerllm.errors import PeerLLMError, UnavailableError
from peerllm.logprobs import unpacked
from peerllm.types import DeploymentId

MODEL_WAIT_S = 120.0  # seconds until the model must be served here
FORM: Literal[3] = 3  # of what one device's API tells another's

log = logging.getLogger(__name__)


class KeptForm(Struct, frozen=True):
    """What another device's API needs besides tokens to go on with an answer."""

    form: Literal[3]
    key: Annotated[str, Meta(max_length=MAX_KEY_CHARS)]
    fingerprint: bytes
    payer: str
    stops: tuple[Annotated[str, Meta(min_length=1)], ...]
    begins: AnswerBegins
    chat: bool  # as in BegunAnswer
    fleeting: bool
    calls: CallsWanted = CallsWanted()
    grammar: str = ""  # of a constrained answer
    logprobs: TopLogprobs | None = None  # as in Generation
    tells_ids: bool = False  # as in Generation


def kept_of(repeat: Repeat, payer: str, begins: AnswerBegins, wanted: Generation, grammar: str = "") -> str:
    """What is to be kept of an answer: a KeptForm."""
    chat, calls = bool(wanted.messages), wanted.calls()
    key, fingerprint, fleeting = repeat.key, repeat.fingerprint, repeat.fleeting
    more = wanted.logprobs, wanted.tells_ids
    kept = KeptForm(FORM, key, fingerprint, payer, wanted.stops, begins, chat, fleeting, calls, grammar, *more)
    return msgspec.json.encode(kept).decode()


def go_on(app: web.Application, answer: InheritedAnswer) -> None:
    """Compute it to its end, and keep it for whoever shows its key; what cannot be gone on with is named in the log."""
    try:
        kept = msgspec.json.decode(answer.kept, type=KeptForm)
        if app[ANSWERS].find(kept.key, kept.fingerprint) is None:
            begin = _begin(app, answer, kept)
            app[ANSWERS].begin(kept.key, kept.fingerprint, kept.payer, begin, kept.fleeting)
    except (PeerLLMError, msgspec.MsgspecError) as error:
        log.warning("an answer that another device began is not gone on with: %s", error)


async def _begin(app: web.Application, answer: InheritedAnswer, kept: KeptForm) -> BegunAnswer:
    model = await _model(app, answer.deployment)
    assert model.model_dir is not None
    text = await app[TEXTS].model(model.deployment, model.model_dir)
    ids, logprobs = _known(answer, kept)
    wanted = GenerateRequest(
        deployment=answer.deployment,
        prompt=answer.prompt,
        max_tokens=answer.max_tokens,
        sampling=answer.sampling,
        client=answer.client,
        patience_s=MODEL_WAIT_S,
        answer=ids,
        kept=answer.kept,
        constraint=text.constraint(kept.grammar),
        logprobs=kept.logprobs,
        known_logprobs=logprobs,
    )
    chunks, silent = _chunks(app, wanted), frozenset(model.stop_ids)
    how = kept.chat, kept.logprobs is not None, kept.tells_ids
    return BegunAnswer(chunks, kept.begins, text, silent, kept.stops, answer.prompt, kept.calls, *how)


def _known(answer: InheritedAnswer, kept: KeptForm) -> tuple[Sequence[int], Sequence[bytes]]:
    """The ids that are known and their log probabilities; none where those are asked for, but not all there."""
    if kept.logprobs is None:
        return answer.ids, ()
    try:
        named = [unpacked(one)[0][0] for one in answer.logprobs]
    except ValueError:
        named = []
    return (answer.ids, answer.logprobs) if named == list(answer.ids) else ((), ())


async def _chunks(app: web.Application, wanted: GenerateRequest) -> AsyncIterator[Chunk]:
    """All of it: what is known, then what comes."""
    if wanted.answer:
        yield Chunk(tuple(wanted.answer), logprobs=tuple(wanted.known_logprobs))
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
