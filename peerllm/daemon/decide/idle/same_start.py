"""Requests may start the same model on several devices before these hear of each other: one of them goes on. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from peerllm.daemon.control_messages import DeploymentView
from peerllm.daemon.facade import short_name
from peerllm.daemon.weights.known_models import all_names

ALIVE = frozenset({"planning", "loading", "serving", "waiting"})


def same_model(model: str, others: Iterable[DeploymentView]) -> list[DeploymentView]:
    """The deployments of others that clients mean, too, when they name `model`."""
    names = all_names(short_name(model), model)
    return [one for one in others if one.state in ALIVE and not names.isdisjoint(_names(one))]


def gives_way(own: DeploymentView, unused: bool, others: Iterable[DeploymentView]) -> bool:
    """Whether a deployment that a request started ends, because another of the same model goes on.

    One that does not serve yet gives way to a person's, to one that serves, and to one that requests started on a
    device of a lower id. Where both serve already, the one of the higher id goes as soon as it is `unused`.
    """
    for one in same_model(own.model, others):
        if own.state != "serving":
            if not one.on_demand or one.state == "serving" or one.coordinator < own.coordinator:
                return True
        elif unused and one.on_demand and one.state == "serving" and one.coordinator < own.coordinator:
            return True
    return False


def _names(view: DeploymentView) -> frozenset[str]:
    """Also without the number that a name got since another device had it."""
    return all_names(view.name, view.model) | {short_name(view.model).lower()}
