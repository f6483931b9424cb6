"""Which model a command means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peerllm.cli.device import LocalDevice
from peerllm.cli.progress import as_model
from peerllm.errors import NotFoundError


def meant(status: Mapping[str, Any], model: str) -> str:
    """A name, path or hub id that the household knows as it is; else a local directory as an absolute path."""
    known = {one[key] for one in status["deployments"] for key in ("name", "model")}
    return model if model in known else as_model(model)


def served_here(device: LocalDevice, model: str | None) -> str:
    """The name of the one asked for, or of the first; NotFoundError if this device coordinates none that serves."""
    status = device.get("/peerllm/v1/status")
    here = status["device"]["name"]
    wanted = None if model is None else meant(status, model)
    found = [one for one in status["deployments"] if wanted in (None, one["name"], one["model"])]
    names = [str(one["name"]) for one in found if one["state"] == "serving" and one["coordinator"] == here]
    if not names:
        elsewhere = [one for one in found if one["coordinator"] != here]
        if elsewhere and model is not None:
            raise NotFoundError(f"{model} was started on {elsewhere[0]['coordinator']}; ask there")
        which = "no model is" if model is None else f"{model} is not"
        raise NotFoundError(f"{which} served from this device; start one with: peerllm run builtin")
    return names[0]
