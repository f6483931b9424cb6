"""A request for a model that cannot answer yet waits for it, within bounds, and is told what it waits for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from aiohttp import web

from peerllm.api.core.answer_events import AnswerWaits
from peerllm.api.core.named_models import find_model, nothing_served
from peerllm.api.error_answers import UnknownModelError
from peerllm.api.keys import HOUSEHOLD, TASKS
from peerllm.api.streams import KEEP_ALIVE_S, each, pulsed
from peerllm.daemon.facade import IDLE_MODEL, ServedModel
from peerllm.errors import UnavailableError

# Seconds, by a model's state.
PATIENCE_S: Mapping[str, float] = {"planning": 120.0, "loading": 120.0, "waiting": 30.0, IDLE_MODEL: 120.0}
LOOK_S = 0.5  # seconds without a token after which it is looked what an answer waits for
PROGRESS_S = 1.0  # seconds between two words to a client that waits
QUIET_S = 5.0  # seconds in which one that waits for a device hears nothing: it may yet be refused with a status
UNKNOWN_S = 1.5  # seconds a name may stay unknown while the household has no model: somebody may just have typed `run`
WORKING = "working"  # the comment that tells nothing: what was told before holds no more


class ModelWaitError(UnavailableError):
    """The model cannot answer now; `loading` says how far it is, `missing_bytes` what memory it lacks."""

    def __init__(self, message: str, model: ServedModel) -> None:
        super().__init__(message)
        self.loading: dict[str, Any] | None = None
        if model.state in ("planning", "loading"):
            self.loading = {"stage": model.state, "percent": round(100 * model.progress), "message": model.message}
        self.missing_bytes = model.missing_bytes


async def awaited_model(
    app: web.Application, name: str, only_here: bool = False
) -> AsyncGenerator[AnswerWaits | ServedModel]:
    """The deployment of that name, once it serves here, or at once if another device is its source (it waits there).

    Before it comes what is being done. ModelWaitError with the reason when it takes longer than PATIENCE_S.
    """
    begun, model = time.monotonic(), await _known(app, name, only_here)
    if model.source or model.state == "serving":
        yield model
        return
    waking: asyncio.Task[None] | None = None
    async with aclosing(pulsed(each(app[HOUSEHOLD].changed()), PROGRESS_S)) as pulse:
        async for _ in pulse:
            if waking is not None and waking.done():
                waking.result()  # raises why it was not started
                waking = None
            model = _still(app, name, only_here, model)
            if model.state == IDLE_MODEL and not model.source and waking is None:
                waking = app[TASKS].waking(model.model, app[HOUSEHOLD].start_model)
            if model.source or model.state == "serving":
                yield model
                return
            waited = time.monotonic() - begun
            if waited >= PATIENCE_S.get(model.state, 0.0):
                break
            if model.state != "waiting" or waited >= QUIET_S:
                yield AnswerWaits(_progress(model))
    what = model.reason or model.message
    why = what if what.startswith(model.state) else f"it is {model.state}{what and f': {what}'}"
    raise ModelWaitError(f"the model {name[:200]!r} cannot answer now, {why}", model)


class WaitingWords:
    """What the client of an answer that begins or goes on here is told while no token comes."""

    def __init__(self, app: web.Application, name: str) -> None:
        self._app, self._name = app, name
        self._queued = 0
        self.tokens_came()

    def tokens_came(self) -> None:
        """The client sees that it goes on."""
        self._queued, self._said, self._at = 0, WORKING, time.monotonic()

    def queued(self, place: int) -> Iterator[AnswerWaits]:
        """Its place in the queue has changed; 0: it has a slot."""
        self._queued = place
        return self.nothing_came()

    def nothing_came(self) -> Iterator[AnswerWaits]:
        """What it waits for, when that changed, and every KEEP_ALIVE_S."""
        words = self._held_up() or (f"queued {self._queued}" if self._queued else WORKING)
        now = time.monotonic()
        if words != self._said or now - self._at >= KEEP_ALIVE_S:
            self._said, self._at = words, now
            yield AnswerWaits(words)

    def _held_up(self) -> str:
        try:
            model = find_model(self._app, self._name, only_here=True)
        except UnknownModelError:
            return ""
        return _progress(model) if model.state in PATIENCE_S else model.message


async def _known(app: web.Application, name: str, only_here: bool) -> ServedModel:
    """The model as it is; UnknownModelError at once where there are others, after UNKNOWN_S where there is none."""
    try:
        return find_model(app, name, only_here)
    except UnknownModelError:
        if only_here or not nothing_served(app):
            raise
    begun = time.monotonic()
    async with aclosing(pulsed(each(app[HOUSEHOLD].changed()), UNKNOWN_S)) as pulse:
        async for _ in pulse:
            if not nothing_served(app) or time.monotonic() - begun >= UNKNOWN_S:
                break
    return find_model(app, name, only_here)


def _still(app: web.Application, name: str, only_here: bool, before: ServedModel) -> ServedModel:
    """The model as it is now; ModelWaitError, not 404, if it was stopped while the client waited."""
    try:
        return find_model(app, name, only_here)
    except UnknownModelError as error:
        text = f"the model {before.name!r} was stopped or could not be started; start it again with: peerllm run"
        raise ModelWaitError(text, before) from error


def _progress(model: ServedModel) -> str:
    text = model.message or (model.reason if model.state == "waiting" else "") or model.state
    return f"{text} ({model.progress:.0%})" if 0.0 < model.progress < 1.0 and "%" not in text else text
