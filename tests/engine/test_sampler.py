"""The sampler: reproducible draws, transformers' order of filters, penalties over the answer."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerllm.engine import sampler
from peerllm.engine.base import Draw
from peerllm.engine.sampler import SeededSampler, penalise, pick, uniform
from peerllm.errors import EngineError
from peerllm.types import Sampling


def draw(position: int = 0, answer: tuple[int, ...] = (), **values: float) -> Draw:
    return Draw(Sampling(**values), position, answer)


def test_greedy_takes_the_first_of_equals():
    logits = np.array([[0.0, 3.0, 3.0, 1.0], [5.0, 0.0, 0.0, 0.0]], np.float32)
    assert SeededSampler()(logits, [draw(), draw()]) == [1, 0]


def test_random_numbers_are_the_same_everywhere():
    # Fixed values: another device must draw the same.
    assert [round(uniform(0, 0), 12), round(uniform(1, 0), 12), round(uniform(0, 1), 12)] == KNOWN
    assert uniform(2**63 - 1, 10**6) < 1.0


KNOWN = [0.348179572088, 0.694643222754, 0.483744550695]


def test_a_replay_draws_the_same_and_other_seeds_do_not():
    logits = np.random.default_rng(1).standard_normal((1, 500), np.float32)
    first = [SeededSampler()(logits, [draw(p, temperature=1.0, seed=5)])[0] for p in range(40)]
    again = [SeededSampler()(logits, [draw(p, temperature=1.0, seed=5)])[0] for p in range(40)]
    other = [SeededSampler()(logits, [draw(p, temperature=1.0, seed=6)])[0] for p in range(40)]
    assert first == again != other
    assert len(set(first)) > 20


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], dtype=np.float32))
    seen = Counter(pick(logits, draw(p, temperature=1.0)) for p in range(4000))
    for token, share in enumerate((0.5, 0.25, 0.125, 0.125)):
        assert abs(seen[token] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000)


def warped(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities as transformers' own warpers leave them."""
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    scores = torch.tensor(logits, dtype=torch.float64).unsqueeze(0)
    steps = [TemperatureLogitsWarper(sampling.temperature)]
    steps += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    steps += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    for step in steps:
        scores = step(None, scores)
    return torch.softmax(scores, dim=-1)[0].numpy()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 3, 20]),
    top_p=st.sampled_from([1.0, 0.9, 0.35]),
    min_p=st.sampled_from([0.0, 0.05, 0.4]),
)
def test_filters_keep_what_transformers_keeps(seed, temperature, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(size=60).astype(np.float32) * 2
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    expected = warped(logits, sampling)
    # The inverse of the distribution that transformers leaves, tokens from the likeliest down.
    order = np.argsort(-expected, kind="stable")
    for position in range(20):
        number = uniform(seed, position)
        sums = np.cumsum(expected[order])
        assert pick(logits, Draw(sampling, position, ())) == order[int(np.searchsorted(sums, number, side="right"))]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.5, 1.0, 30.0]),
    top_p=st.sampled_from([1.0, 0.95, 0.2]),
    min_p=st.sampled_from([0.0, 0.01]),
    top_k=st.sampled_from([0, 100]),
)
def test_sorting_only_the_likeliest_changes_nothing(seed, temperature, top_p, min_p, top_k):
    logits = np.random.default_rng(seed).normal(size=400).astype(np.float32).round(1)  # with many equals
    kind = Sampling(temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k, seed=seed)
    before = sampler.SORTED_AT_FIRST
    try:
        sampler.SORTED_AT_FIRST = 8
        some = [pick(logits, Draw(kind, position, ())) for position in range(20)]
        sampler.SORTED_AT_FIRST = 10**6
        assert some == [pick(logits, Draw(kind, position, ())) for position in range(20)]
    finally:
        sampler.SORTED_AT_FIRST = before


def test_penalties():
    scores = np.array([2.0, -2.0, 1.0, 4.0])
    got = penalise(scores.copy(), Sampling(repetition_penalty=2.0), (0, 1, 1))
    assert got.tolist() == [1.0, -4.0, 1.0, 4.0]
    got = penalise(scores.copy(), Sampling(presence_penalty=0.5, frequency_penalty=0.25), (3, 1, 1))
    assert got.tolist() == [2.0, -3.0, 1.0, 3.25]
    assert pick(np.array([3.0, 2.9], dtype=np.float32), draw(answer=(0,), presence_penalty=1.0)) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_are_refused(bad):
    with pytest.raises(EngineError, match="finite"):
        SeededSampler()(np.array([[0.0, bad]], np.float32), [draw()])


def test_rows_and_draws_must_match():
    with pytest.raises(EngineError):
        SeededSampler()(np.zeros((2, 3), np.float32), [draw()])


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 100.0])
def test_extreme_temperatures(temperature):
    logits = np.array([[1.0, 9.0, 3.0]], np.float32)
    token = SeededSampler()(logits, [draw(temperature=temperature)])[0]
    assert token == 1 if temperature < 1 else token in (0, 1, 2)
