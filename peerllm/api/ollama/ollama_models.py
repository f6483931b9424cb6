"""The models of the household as Ollama's clients list them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from aiohttp import web
from msgspec import Meta, Struct

from peerllm.api.core.generation import MAX_NAME_CHARS
from peerllm.api.core.named_models import find_model, listed_models
from peerllm.api.error_answers import FieldError
from peerllm.api.keys import HOUSEHOLD, TEXTS
from peerllm.api.ollama.ollama_answers import stamp
from peerllm.api.ollama.ollama_objects import LoadedModels, OllamaModel, OllamaModels, ShownModel
from peerllm.api.text.text_store import AnswerText
from peerllm.daemon.facade import ANY_TAG, ServedModel
from peerllm.daemon.facade_objects import DeploymentStatus, DeviceStatus, StageStatus
from peerllm.regular_files import read_regular

CPU = "cpu"  # the place of a device without an accelerator
FAMILY = "peerllm"  # where the architecture is not known; clients look below this name for the context's length
MAX_LICENSE_BYTES = 256 << 10
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


async def shown(app: web.Application, name: str) -> ShownModel:
    """One of them; UnknownModelError if there is none of that name. Only its source knows its template."""
    model = find_model(app, name)
    here = await app[TEXTS].model(model.deployment, model.model_dir) if model.model_dir is not None else None
    directory = model.model_dir
    entry = _entry(model, _deployments(app))
    family = model.details.family or FAMILY
    information: dict[str, Any] = {"general.architecture": family, "general.basename": model.name}
    if model.details.parameters:
        information["general.parameter_count"] = model.details.parameters
    if model.context:
        information[f"{family}.context_length"] = model.context
    defaults = {**({"num_ctx": model.context} if model.context else {}), **(here.defaults if here is not None else {})}
    return {
        "modelfile": f"# {model.model}",
        "parameters": "\n".join(f"{name:<30} {value}" for name, value in defaults.items()),
        "template": _template(here) if here is not None else "",
        "license": await asyncio.to_thread(_license, directory) if directory is not None else "",
        "details": entry["details"],
        "model_info": information,
        "capabilities": [*entry["capabilities"], *(["insert"] if here is not None and here.fill_in else [])],
        "modified_at": entry["modified_at"],
    }


def _template(text: AnswerText) -> str:
    """That of the model, for chats. Clients look for `.Suffix` in it to know that a gap can be filled in."""
    if not text.fill_in:
        return text.template
    filled = text.fill_in.format(before="{{ .Prompt }}", after="{{ .Suffix }}")
    return "{{- if .Suffix }}" + filled + "{{ end }}" + text.template


def _license(directory: Path) -> str:
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        with contextlib.suppress(OSError):
            return read_regular(directory / name, MAX_LICENSE_BYTES).decode("utf-8", "replace")
    return ""


def _entry(model: ServedModel, facts: Mapping[str, DeploymentStatus]) -> OllamaModel:
    name, about = model.name if ":" in model.name else model.name + ANY_TAG, model.details
    return {
        "name": name,
        "model": name,
        "modified_at": stamp(model.created),
        "size": sum(one["memory_bytes"] for one in _stages(model, facts)) or model.disk_bytes,
        "digest": hashlib.sha256(f"{name} {model.model}".encode()).hexdigest(),  # whether it runs or not
        "details": {
            "parent_model": "",
            "format": about.file_format,
            "family": about.family or FAMILY,
            "families": [about.family or FAMILY],
            "parameter_size": _size(about.parameters),
            "quantization_level": about.level,
        },
        "context_length": model.context,
        "capabilities": ["completion", *model.abilities],
    }


def _size(parameters: int) -> str:
    """As Ollama writes it: "7.6B", "134.52M"; "" where it is not known."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.{2 if letter == 'M' else 1}f}".rstrip("0").rstrip(".") + letter
    return ""


def _stages(model: ServedModel, facts: Mapping[str, DeploymentStatus]) -> Sequence[StageStatus]:
    return facts[model.deployment]["plan"]["stages"] if model.deployment in facts else ()


def _deployments(app: web.Application) -> dict[str, DeploymentStatus]:
    return {one["id"]: one for one in app[HOUSEHOLD].status()["deployments"]}
