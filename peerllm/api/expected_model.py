"""Models that are about to be started here: known before there is a deployment, so that requests can wait for them."""

from __future__ import annotations

import time

from peerllm.daemon.facade import ServedModel, short_name

EXPECTED_S = 300.0  # seconds after which a model is expected no more
MAX_EXPECTED = 64


class ExpectedModel:
    """Who starts a device in order to run a model there (`peerllm demo`) names it at the start; "": none."""

    def __init__(self, model: str) -> None:
        self._until: dict[tuple[str, str], float] = {}  # by model and name
        if model:
            self.expect(model)

    def expect(self, model: str, name: str = "") -> None:
        """Somebody has asked to run this model, under this name if one is given."""
        now = time.monotonic()
        self._until = {key: until for key, until in self._until.items() if now < until}
        if len(self._until) < MAX_EXPECTED:
            self._until[model, name or short_name(model)] = now + EXPECTED_S

    def forget(self, model: str) -> None:
        """This model was run: the household knows more of it."""
        self._until = {key: until for key, until in self._until.items() if key[0] != model}

    def models(self) -> list[ServedModel]:
        """As if they were being planned; empty where none is expected."""
        now = time.monotonic()
        return [_planned(model, name) for (model, name), until in self._until.items() if now < until]


def _planned(model: str, name: str) -> ServedModel:
    return ServedModel(
        deployment="",
        name=name,
        model=model,
        state="planning",
        reason="",
        created=0,
        model_dir=None,
        context=0,
        stop_ids=(),
        message="the devices are being started",
    )
