"""GET /v1/models, finding the deployment a client names, and waiting for it while it is planned or loaded."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

from aiohttp import web

from peerllm.api.error_answers import UnknownModelError, json_response
from peerllm.api.keys import EXPECTED, HOUSEHOLD
from peerllm.api.streams import each, pulsed
from peerllm.daemon.facade import ServedModel
from peerllm.errors import UnavailableError

PATIENCE_S: Mapping[str, float] = {"planning": 120.0, "loading": 120.0, "waiting": 5.0}  # seconds, by a model's state
PROGRESS_S = 1.0  # seconds between two words to a client that waits
_GONE = ("failed", "stopped")  # states of deployments that clients need not see

Tell = Callable[[str], Awaitable[None]]


async def list_models(request: web.Request) -> web.Response:
    """The models whose source is this device, those that are about to be started among them."""
    found = [_object(model) for model in _models(request.app) if model.state not in _GONE]
    return json_response({"object": "list", "data": found})


async def one_model(request: web.Request) -> web.Response:
    """One of them, 404 if there is none of that name."""
    return json_response(_object(find_model(request.app, request.match_info["id"])))


def find_model(app: web.Application, name: str) -> ServedModel:
    """The deployment of that name, path or hub id; UnknownModelError names what there is instead."""
    models = _models(app)
    for one in models:
        if name in (one.name, one.model):
            return one
    served = [one.name for one in models if one.state not in _GONE]
    there = "this device serves none; start one with: peerllm run MODEL"
    if served:
        there = f"this device serves: {', '.join(served)}"
    status = app[HOUSEHOLD].status()
    for deployment in status.get("deployments", ()):
        elsewhere = deployment.get("coordinator") != status["device"]["name"]
        if elsewhere and name in (deployment.get("name"), deployment.get("model")):
            there = f"it was started on {deployment.get('coordinator')}, ask there; {there}"
    raise UnknownModelError(f"no model {name[:200]!r} here; {there}", "model", "model_not_found")


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
    """As it is now; a model that was given up meanwhile is no unknown one."""
    try:
        return find_model(app, name)
    except UnknownModelError as error:
        text = f"the model {before.name!r} was stopped or could not be started; start it again with: peerllm run"
        raise UnavailableError(text) from error


def _models(app: web.Application) -> list[ServedModel]:
    models = app[HOUSEHOLD].models()
    started = {one.model for one in models}
    return [*models, *(one for one in app[EXPECTED].models() if one.model not in started)]


def _progress(model: ServedModel) -> str:
    text = model.message or model.state
    return f"{text} ({model.progress:.0%})" if model.progress and "%" not in text else text


def _object(model: ServedModel) -> dict[str, Any]:
    """OpenAI's model object, with what is ours beside it."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "peerllm",
        "model": model.model,
        "state": model.state,
        "reason": model.reason,
        "message": model.message,
        "progress": model.progress,
        "context": model.context,
    }
