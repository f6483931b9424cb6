"""GET /v1/models, and finding the deployment that a client names."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from peerllm.api.error_answers import UnknownModelError, json_response
from peerllm.api.keys import EXPECTED, HOUSEHOLD
from peerllm.daemon.facade import ServedModel

_GONE = ("failed", "stopped")  # states of deployments that clients need not see


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


def _models(app: web.Application) -> list[ServedModel]:
    models = app[HOUSEHOLD].models()
    started = {one.model for one in models}
    return [*models, *(one for one in app[EXPECTED].models() if one.model not in started)]


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
