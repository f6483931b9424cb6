"""The models of the household as Ollama's clients list them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from aiohttp import web
from msgspec import Meta, Struct

from peerllm.api.core.generation import MAX_NAME_CHARS
from peerllm.api.core.named_models import ANY_TAG, find_model, listed_models
from peerllm.api.error_answers import FieldError
from peerllm.api.keys import HOUSEHOLD
from peerllm.api.ollama.ollama_answers import stamp
from peerllm.api.ollama.ollama_objects import LoadedModels, OllamaModel, OllamaModels, ShownModel
from peerllm.daemon.facade import ServedModel
from peerllm.daemon.facade_objects import DeploymentStatus, DeviceStatus, StageStatus

CPU = "cpu"  # the place of a device without an accelerator
FAMILY = "peerllm"  # clients look below this name for the context's length
NEVER = "2318-01-01T00:00:00Z"  # when a model is unloaded that is not; Ollama writes a year like this, too


class ShowBody(Struct):
    """Older clients say `name`."""

    model: Annotated[str, Meta(max_length=MAX_NAME_CHARS)] | None = None
    name: Annotated[str, Meta(max_length=MAX_NAME_CHARS)] | None = None

    def asked(self) -> str:
        name = self.model or self.name
        if not name:
            raise FieldError("model is missing", "model")
        return name


def tags(app: web.Application) -> OllamaModels:
    """Every model of the household."""
    facts = _deployments(app)
    return {"models": [_entry(model, facts) for model in listed_models(app)]}


def running(app: web.Application) -> LoadedModels:
    """Those that can answer now."""
    facts = _deployments(app)
    serving = {model.deployment: model for model in reversed(listed_models(app)) if model.state == "serving"}
    accelerated = {one["name"] for one in app[HOUSEHOLD].status()["devices"] if _accelerated(one)}
    return {
        "models": [
            {
                **_entry(model, facts),
                "expires_at": stamp(model.expires) if model.expires else NEVER,
                "size_vram": sum(one["memory_bytes"] for one in _stages(model, facts) if one["device"] in accelerated),
            }
            for model in reversed(serving.values())
        ]
    }


def _accelerated(device: DeviceStatus) -> bool:
    return device["compute"].get("place", CPU) != CPU


def shown(app: web.Application, name: str) -> ShownModel:
    """One of them; UnknownModelError if there is none of that name."""
    model = find_model(app, name)
    entry = _entry(model, _deployments(app))
    information: dict[str, Any] = {"general.architecture": FAMILY, "general.basename": model.name}
    if model.context:
        information[f"{FAMILY}.context_length"] = model.context
    return {
        "modelfile": f"# {model.model}",
        "parameters": "",
        "template": "",
        "details": entry["details"],
        "model_info": information,
        "capabilities": entry["capabilities"],
        "modified_at": entry["modified_at"],
    }


def _entry(model: ServedModel, facts: Mapping[str, DeploymentStatus]) -> OllamaModel:
    name = model.name if ":" in model.name else model.name + ANY_TAG
    told = facts.get(model.deployment)
    return {
        "name": name,
        "model": name,
        "modified_at": stamp(model.created),
        "size": sum(one["memory_bytes"] for one in _stages(model, facts)) or model.disk_bytes,
        "digest": hashlib.sha256((model.deployment or model.model).encode()).hexdigest(),
        "details": {
            "parent_model": "",
            "format": "",
            "family": FAMILY,
            "families": [FAMILY],
            "parameter_size": "",
            "quantization_level": told["weights"] if told is not None else "",
        },
        "context_length": model.context,
        "capabilities": ["completion", *model.abilities],
    }


def _stages(model: ServedModel, facts: Mapping[str, DeploymentStatus]) -> Sequence[StageStatus]:
    return facts[model.deployment]["plan"]["stages"] if model.deployment in facts else ()


def _deployments(app: web.Application) -> dict[str, DeploymentStatus]:
    return {one["id"]: one for one in app[HOUSEHOLD].status()["deployments"]}
