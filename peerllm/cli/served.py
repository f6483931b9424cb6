"""Which model a command means."""

from __future__ import annotations

from peerllm.cli.device import LocalDevice
from peerllm.errors import NotFoundError


def served_here(device: LocalDevice, model: str | None) -> str:
    """The one asked for, or the first; NotFoundError if this device coordinates none that serves."""
    status = device.get("/peerllm/v1/status")
    here = status["device"]["name"]
    names = [
        str(one["model"])
        for one in status["deployments"]
        if one["state"] == "serving" and one["coordinator"] == here and model in (None, one["model"])
    ]
    if not names:
        elsewhere = [one for one in status["deployments"] if one["coordinator"] != here and model == one["model"]]
        if elsewhere:
            raise NotFoundError(f"{model} was started on {elsewhere[0]['coordinator']}; ask there")
        which = "no model is" if model is None else f"{model} is not"
        raise NotFoundError(f"{which} served from this device; start one with: peerllm run builtin")
    return names[0]
