"""A request for a model that is still planned or loaded waits for it, within bounds."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing

from aiohttp import web

from peerllm.api.error_answers import UnknownModelError
from peerllm.api.keys import HOUSEHOLD
from peerllm.api.openai.models import find_model
from peerllm.api.streams import each, pulsed
from peerllm.daemon.facade import ServedModel
from peerllm.errors import UnavailableError

PATIENCE_S: Mapping[str, float] = {"planning": 120.0, "loading": 120.0, "waiting": 5.0}  # seconds, by a model's state
PROGRESS_S = 1.0  # seconds between two words to a client that waits

Tell = Callable[[str], Awaitable[None]]


async def serving_model(app: web.Application, name: str, tell: Tell) -> ServedModel:
    """The deployment of that name once it serves; `tell` hears meanwhile what is being done.

    UnavailableError with the reason when it takes longer than PATIENCE_S.
    """
    begun, model = time.monotonic(), find_model(app, name)
    if model.state == "serving":
        return model
    async with aclosing(pulsed(each(app[HOUSEHOLD].changed()), PROGRESS_S)) as pulse:
        async for _ in pulse:
            model = _still(app, name, model)
            if model.state == "serving":
                return model
            if time.monotonic() - begun >= PATIENCE_S.get(model.state, 0.0):
                break
            if model.state != "waiting":
                await tell(_progress(model))
    what = model.reason or model.message
    raise UnavailableError(f"the model {name[:200]!r} cannot answer now, it is {model.state}{what and f': {what}'}")


def _still(app: web.Application, name: str, before: ServedModel) -> ServedModel:
    """The model as it is now; UnavailableError, not 404, if it was stopped while the client waited."""
    try:
        return find_model(app, name)
    except UnknownModelError as error:
        text = f"the model {before.name!r} was stopped or could not be started; start it again with: peerllm run"
        raise UnavailableError(text) from error


def _progress(model: ServedModel) -> str:
    text = model.message or model.state
    return f"{text} ({model.progress:.0%})" if model.progress and "%" not in text else text
