"""The model that is about to be started here: known before there is a deployment, so that requests can wait for it."""

from __future__ import annotations

import time

from peerllm.daemon.facade import ServedModel, short_name

EXPECTED_S = 300.0  # seconds after which it is expected no more


class ExpectedModel:
    """Who starts a device in order to run a model there (`peerllm demo`) names it at the start; "": none."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._until = time.monotonic() + EXPECTED_S

    def forget(self, model: str) -> None:
        """This model was run: the household knows more of it."""
        if model == self._model:
            self._model = ""

    def models(self) -> list[ServedModel]:
        """As if it were being planned; empty where none is expected."""
        if not self._model or time.monotonic() >= self._until:
            return []
        return [
            ServedModel(
                deployment="",
                name=short_name(self._model),
                model=self._model,
                state="planning",
                reason="",
                created=0,
                model_dir=None,
                context=0,
                stop_ids=(),
                message="the devices are being started",
            )
        ]
