"""From logits to a token. The random number depends on seed and position alone, so a replay draws the same token.

The order is transformers': penalties, the mask, temperature, top-k, top-p, min-p. Penalties count the answer's own
tokens, since the head may be on another device than the source, and only the source may know the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from peerllm.engine.base import Draw
from peerllm.errors import EngineError
from peerllm.logprobs import packed
from peerllm.types import Sampling

Floats = npt.NDArray[np.float64]
LEAST = float(np.finfo(np.float32).min)  # the logarithm of no probability at all
SORTED_AT_FIRST = 1024  # the likeliest tokens, sorted first; the whole vocabulary is sorted only if they do not suffice


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, the same on every device."""
    key = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    digest = blake2b(key, digest_size=8, person=b"peerllm-draw").digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


class SeededSampler:
    """Implements base.Sampler. `logits` are float32 [k, vocabulary]; EngineError if one is not finite."""

    def __call__(self, logits: npt.ArrayLike, draws: Sequence[Draw]) -> list[int]:
        rows = np.asarray(logits, np.float32)
        if len(draws) != len(rows):
            raise EngineError(f"{len(rows)} rows of logits for {len(draws)} draws")
        return [pick(row, draw) for row, draw in zip(rows, draws, strict=True)]


def pick(row: npt.NDArray[np.float32], draw: Draw) -> int:
    """Draw one token id from one row of logits [vocabulary]."""
    if not np.isfinite(row).all():
        raise EngineError("the model computed logits that are no finite numbers; try --exact")
    sampling = draw.sampling
    scores = penalise(row.astype(np.float64), sampling, draw.answer)
    allowed = None if draw.mask is None else allowed_ids(draw.mask, len(row))
    if allowed is not None:
        scores = scores[allowed]  # the others do not count at all: not as likely ones, nor as parts of a sum
    if sampling.temperature == 0.0 or sampling.top_k == 1:
        picked = int(scores.argmax())  # the first of equals
    else:
        even = (scores - scores.max()) / sampling.temperature
        picked = _draw(even, sampling, uniform(sampling.seed, draw.position))
    return picked if allowed is None else int(allowed[picked])


def token_logprobs(row: npt.NDArray[np.float32], token: int, count: int) -> bytes:
    """Of a token that was drawn and of the `count` likeliest, falling, equals by id: see logprobs.packed.

    They are the model's own: of its logits as they are, before penalties, mask and temperature.
    """
    with np.errstate(over="ignore"):  # to minus infinity, which counts for nothing
        even = row - row.max()
    whole = math.log(np.exp(even).sum(dtype=np.float64))
    count = min(count, len(row))
    ids = [token]
    if count:
        likeliest = np.flatnonzero(even >= np.partition(even, -count)[-count])
        ids += likeliest[np.argsort(-even[likeliest], kind="stable")][:count].tolist()
    return packed(zip(ids, np.maximum(even[ids] - whole, LEAST).tolist(), strict=True))


def allowed_ids(mask: bytes, vocabulary: int) -> npt.NDArray[np.int64]:
    """The token ids that a mask allows, rising; EngineError if it is of another vocabulary, or allows none."""
    if len(mask) != mask_bytes(vocabulary):
        raise EngineError(f"a mask of {len(mask)} bytes came for {vocabulary} tokens")
    allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), count=vocabulary, bitorder="little"))
    if not len(allowed):
        raise EngineError("a mask came that allows no token")
    return allowed


def mask_bytes(vocabulary: int) -> int:
    """How long a mask is."""
    return (vocabulary + 7) // 8


def penalises(sampling: Sampling) -> bool:
    """Whether a token's chances depend on the answer so far."""
    penalties = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
    return penalties != (1.0, 0.0, 0.0)


def penalise(scores: Floats, sampling: Sampling, answer: Sequence[int]) -> Floats:
    """Lower the scores [vocabulary] of tokens that the answer already contains."""
    if not answer or not penalises(sampling):
        return scores
    ids, counts = np.unique(np.asarray(answer, dtype=np.int64), return_counts=True)
    there = (ids >= 0) & (ids < len(scores))
    ids, counts = ids[there], counts[there]
    old, factor = scores[ids], sampling.repetition_penalty
    scores[ids] = np.where(old < 0, old * factor, old / factor)
    scores[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return scores


def _draw(scores: Floats, sampling: Sampling, number: float) -> int:
    """Invert the cumulative distribution over tokens by falling score, equals by id; the largest score is 0."""
    ids = np.arange(len(scores))
    if 0 < sampling.top_k < len(scores):
        least = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        ids = ids[scores >= least]
    total = float(np.exp(scores[ids]).sum())
    for sorted_ids in _prefixes(scores, ids):
        weights = np.exp(scores[sorted_ids])
        sums = np.cumsum(weights)
        complete = len(sorted_ids) == len(ids)
        kept = len(sorted_ids)
        if sampling.top_p < 1.0:
            kept = min(kept, int(np.searchsorted(sums, sampling.top_p * total, side="left")) + 1)
        if sampling.min_p > 0.0:
            kept = min(kept, max(int((weights >= sampling.min_p).sum()), 1))
        if not complete and kept == len(sorted_ids):
            if sampling.top_p < 1.0 or sampling.min_p > 0.0 or number * total >= sums[-1]:
                continue
            mass = total
        else:
            mass = float(sums[kept - 1]) if kept < len(ids) else total
        return int(sorted_ids[min(int(np.searchsorted(sums[:kept], number * mass, side="right")), kept - 1)])
    raise AssertionError("the last prefix is complete")


def _prefixes(scores: Floats, ids: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """`ids` sorted by falling score, equals by id: first only the likeliest ones, then all."""
    if len(ids) > 2 * SORTED_AT_FIRST:
        some = scores[ids]
        likely = ids[some >= np.partition(some, -SORTED_AT_FIRST)[-SORTED_AT_FIRST]]
        yield likely[np.argsort(-scores[likely], kind="stable")]
    yield ids[np.argsort(-scores[ids], kind="stable")]
