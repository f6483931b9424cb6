"""Models that are about to be started here: named before there is a deployment, so that requests can wait for it."""

from __future__ import annotations

import time

from peerllm.daemon.facade import ServedModel
from peerllm.errors import OverloadedError

MAX_EXPECTED = 16
MAX_EXPECTED_S = 600  # seconds that one may be announced ahead


class ExpectedModels:
    """Who starts devices before the model (`peerllm demo`) announces it here; each is forgotten after its time."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}  # by model: monotonic seconds

    def announce(self, model: str, seconds: float) -> None:
        """OverloadedError when too many are announced already."""
        if len(self.models()) >= MAX_EXPECTED and model not in self._until:
            raise OverloadedError(f"{MAX_EXPECTED} models are expected already; ask again in a moment")
        self._until[model] = time.monotonic() + seconds

    def forget(self, model: str) -> None:
        self._until.pop(model, None)

    def models(self) -> list[ServedModel]:
        """As if they were being planned."""
        now = time.monotonic()
        self._until = {model: until for model, until in self._until.items() if until > now}
        return [
            ServedModel(
                deployment="",
                name=model.rstrip("/").rpartition("/")[2] or model,
                model=model,
                state="planning",
                reason="",
                created=0,
                model_dir=None,
                context=0,
                stop_ids=(),
                message="the devices are being started",
            )
            for model in self._until
        ]
