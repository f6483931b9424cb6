"""GET /v1/models, and finding the deployment a client names."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from peerllm.api.error_answers import UnknownModelError, json_response
from peerllm.api.keys import HOUSEHOLD
from peerllm.daemon.facade import Household, ServedModel
from peerllm.errors import UnavailableError

_GONE = ("failed", "stopped")  # states of deployments that clients need not see


async def list_models(request: web.Request) -> web.Response:
    """The models whose source is this device."""
    found = [_object(model) for model in request.app[HOUSEHOLD].models() if model.state not in _GONE]
    return json_response({"object": "list", "data": found})


async def one_model(request: web.Request) -> web.Response:
    """One of them, 404 if there is none of that name."""
    return json_response(_object(find_model(request.app[HOUSEHOLD], request.match_info["id"])))


def find_model(household: Household, name: str) -> ServedModel:
    """The deployment of that name, serving if any is; UnknownModelError names what there is instead."""
    models = household.models()
    named = sorted((one for one in models if one.name == name), key=lambda one: (one.state != "serving", -one.created))
    if named:
        return named[0]
    served = [one.name for one in models if one.state not in _GONE]
    there = "this device serves none; start one with: peerllm run MODEL"
    if served:
        there = f"this device serves: {', '.join(served)}"
    for deployment in household.status().get("deployments", ()):
        if deployment.get("model") == name:
            there = f"it was started on {deployment.get('coordinator')}, ask there; {there}"
    raise UnknownModelError(f"no model {name[:200]!r} here; {there}", "model", "model_not_found")


def serving_model(household: Household, name: str) -> ServedModel:
    """The deployment of that name; UnavailableError with the reason while it cannot answer."""
    model = find_model(household, name)
    if model.state != "serving":
        why = f": {model.reason}" if model.reason else ""
        raise UnavailableError(f"the model {name[:200]!r} cannot answer now, it is {model.state}{why}")
    return model


def _object(model: ServedModel) -> dict[str, Any]:
    """OpenAI's model object, with what is ours beside it."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "peerllm",
        "state": model.state,
        "reason": model.reason,
        "context": model.context,
    }
