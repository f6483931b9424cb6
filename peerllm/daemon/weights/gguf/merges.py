"""In which order pairs of pieces become one piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peerllm.daemon.weights.gguf.token_table import numbers, texts
from peerllm.errors import ModelError

MAX_MERGES = 1 << 22
MAX_SPLITS = 1 << 24  # places where tokens could be cut in two, over all tokens; Gemma's 262,144 have 1.7 million
MAX_PIECE_CHARS = 512
MAX_MERGE_CHARS = 1 << 27  # of all merges that follow from scores

Merge = tuple[str, str]


def listed_merges(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> list[Merge]:
    """The merges that the file lists; each joins two tokens to a third."""
    merges = []
    for line in texts(metadata, "merges", MAX_MERGES):
        left, _, right = line.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise ModelError(f"the GGUF file merges {line[:80]!r}, which are not two of its tokens that make a third")
        merges.append((left, right))
    return merges


def scored_merges(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[Merge]:
    """The merges that SentencePiece does: of all neighbours that make a token, those that make the best one first."""
    scores = numbers(metadata, "scores", len(tokens))
    if scores is None or np.isnan(scores).any():
        raise ModelError("the GGUF file's tokenizer.ggml.scores are missing, or are not numbers")
    lengths = [len(token) for token in tokens]
    if sum(lengths) > MAX_SPLITS or max(lengths) > MAX_PIECE_CHARS:
        raise ModelError(
            f"the GGUF file's tokens have more than {MAX_SPLITS} characters, or one has more than {MAX_PIECE_CHARS}"
        )
    best_first = np.argsort(-scores.astype(np.float64), kind="stable")  # of equal scores the one learned first
    known = {token: token for token in tokens}
    merges: list[Merge] = []
    chars = 0
    for number in best_first.tolist():
        token = tokens[number]
        for at in range(len(token) - 1, 0, -1):
            left, right = known.get(token[:at]), known.get(token[at:])
            if left is not None and right is not None:
                chars += len(token)
                if chars > MAX_MERGE_CHARS or len(merges) >= MAX_MERGES:
                    raise ModelError("the GGUF file's tokens can be merged in more ways than those of any model")
                merges.append((left, right))
    return merges
