"""Which model `chat` means when none is named."""

from __future__ import annotations

from typing import Any, cast

import pytest

from peerllm.cli.chat import only_model
from peerllm.cli.device import LocalDevice
from peerllm.errors import NotFoundError


class Listing:
    """A device that lists these: id, model, state."""

    def __init__(self, *models: tuple[str, str, str]) -> None:
        self.models = models

    def get(self, _: str) -> dict[str, Any]:
        return {
            "data": [{"id": name, "model": model, "created": 7, "state": state} for name, model, state in self.models]
        }


def meant(*models: tuple[str, str, str]) -> str:
    return only_model(cast("LocalDevice", Listing(*models)))


def test_other_names_of_a_model_are_no_choice() -> None:
    own, other, idle = ("smollm2", "smollm2", "serving"), ("gpt-4o", "smollm2", "serving"), ("b", "b", "idle")
    assert meant(own, other, idle) == "smollm2"
    with pytest.raises(NotFoundError, match=r"several models; choose one with --model: smollm2, qwen"):
        meant(own, other, ("qwen", "q", "loading"))
    with pytest.raises(NotFoundError, match="no model"):
        meant(idle)
