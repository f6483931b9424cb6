"""Rotations whose frequencies are divided by numbers from a file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from peerllm.engine.graph.config_values import UnfitError
from peerllm.engine.graph.describe import describe
from peerllm.engine.graph.rotation import inverse_frequencies, tables
from peerllm.engine.graph.structure import Rope

PLAIN = Rope(8, 5000.0)
SHORT, LONG = (1.0, 1.5, 2.0, 4.0), (2.0, 3.0, 4.0, 8.0)
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "vocab_size": 10, "num_hidden_layers": 1, "num_attention_heads": 8,
    "max_position_embeddings": 400,
}  # fmt: skip


def rope_of(**scaling: Any) -> Rope:
    about = {"rope_type": "divided", "rope_theta": 5000.0, **scaling}
    found = describe({**LLAMA, "rope_parameters": about}).blocks[0].block.attention.rope
    assert found is not None
    return found


def test_each_frequency_is_divided() -> None:
    plain, _ = inverse_frequencies(PLAIN)
    found, factor = inverse_frequencies(rope_of(divisors=list(SHORT)))
    np.testing.assert_allclose(found, plain / np.array(SHORT), rtol=1e-6)
    assert factor == 1.0


def test_the_context_that_is_served_chooses_the_divisors() -> None:
    rope = rope_of(
        divisors=list(SHORT), long_divisors=list(LONG), original_max_position_embeddings=64, attention_factor=1.25
    )
    plain, _ = inverse_frequencies(PLAIN)
    for positions, divisors in ((64, SHORT), (65, LONG)):
        cosines, sines = tables(rope, positions)
        angles = np.arange(positions)[:, None] * plain / np.array(divisors)
        np.testing.assert_allclose(cosines, 1.25 * np.cos(angles), atol=1e-5)
        np.testing.assert_allclose(sines, 1.25 * np.sin(angles), atol=1e-5)


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"divisors": [1.0] * 3},
        {"divisors": [1.0, 1.0, 1.0, 0.0]},
        {"divisors": [1.0, 1.0, 1.0, "x"]},
        {"divisors": 2.0},
        {"divisors": [[1.0] * 4]},
        {"divisors": [1.0] * 4, "long_divisors": [1.0] * 5, "original_max_position_embeddings": 64},
        {"divisors": [1.0] * 4, "long_divisors": [1.0] * 4, "original_max_position_embeddings": "64"},
        {"divisors": [1.0] * 4, "attention_factor": "x"},
    ],
)
def test_unusable_divisors_are_refused(scaling: dict[str, Any]) -> None:
    with pytest.raises(UnfitError):
        rope_of(**scaling)
