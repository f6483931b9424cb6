"""The models of the household, and the one that a client names."""

from __future__ import annotations

from aiohttp import web

from peerllm.api.error_answers import UnknownModelError
from peerllm.api.keys import EXPECTED, HOUSEHOLD
from peerllm.daemon.facade import ANY_TAG, IDLE_MODEL, ServedModel, without_prefix
from peerllm.types import DeviceId

_GONE = ("failed", "stopped")  # states of deployments that clients need not see
# Of several deployments of one name the first is meant.
_BEST = ("serving", "loading", "planning", "waiting", IDLE_MODEL)


def listed_models(app: web.Application) -> list[ServedModel]:
    """The household's models, the oldest first: the same on every device. Those about to be started here come after
    them, and last those that are on a disk only. A model's own name precedes those that clients gave it.
    """
    found = [model for model in _models(app) if model.state not in _GONE]
    return sorted(found, key=lambda one: (one.state == IDLE_MODEL, not one.created, one.created, one.alias, one.name))


def find_model(app: web.Application, name: str, only_here: bool = False) -> ServedModel:
    """The model of that name, path or hub id, or else in another way of calling it; UnknownModelError names what runs.

    `only_here`: those whose source is this device.
    """
    models = [model for model in _models(app) if not (only_here and model.source)]
    names = {name, name.removesuffix(ANY_TAG)}
    found = [model for model in models if not names.isdisjoint((model.name, model.model))]
    if not found or all(model.state in (*_GONE, IDLE_MODEL) for model in found):
        called = without_prefix(name.lower()).removesuffix(ANY_TAG)
        found += [model for model in models if called in model.names]
    if found:
        return min(found, key=lambda model: _BEST.index(model.state) if model.state in _BEST else len(_BEST))
    served = dict.fromkeys(model.name for model in models if model.state not in (*_GONE, IDLE_MODEL))
    there = f"the household serves: {', '.join(served)}" if served else "start one with: peerllm run MODEL"
    raise UnknownModelError(f"no model {name[:200]!r} here; {there}", "model", "model_not_found")


def device_name(app: web.Application, device: DeviceId) -> str:
    """What the household calls a device."""
    known = (one["name"] for one in app[HOUSEHOLD].status()["devices"] if one["id"] == device)
    return next(known, device[:8])


def nothing_served(app: web.Application) -> bool:
    """Whether the household has no model at all, not even one under way."""
    return all(model.state in (*_GONE, IDLE_MODEL) for model in _models(app))


def _models(app: web.Application) -> list[ServedModel]:
    models = app[HOUSEHOLD].models()
    running = [one for one in models if not one.source and one.state != IDLE_MODEL]
    started = {known for one in running for known in (one.model, one.name)}
    expected = [one for one in app[EXPECTED].models() if one.model not in started]
    coming = {known for one in expected for known in (one.model, one.name)}
    return [*(one for one in models if one.state != IDLE_MODEL or coming.isdisjoint((one.model, one.name))), *expected]
