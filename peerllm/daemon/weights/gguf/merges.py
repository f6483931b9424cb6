"""In which order pairs of pieces become one piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from peerllm.daemon.weights.gguf.token_table import BYTE, CONTROL, UNKNOWN, TokenTable, numbers, texts
from peerllm.errors import ModelError

MAX_MERGES = 1 << 22
MAX_SPLITS = 1 << 24  # places where tokens could be cut in two, over all tokens; Gemma's 262,144 have 1.7 million
MAX_PIECE_CHARS = 512

Merge = tuple[str, str]


def listed_merges(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> list[Merge]:
    """The merges that the file lists; each joins two tokens to a third."""
    merges = []
    for line in texts(metadata, "merges", MAX_MERGES):
        at = line.find(" ", 1)  # a piece may begin with a space, but has none within
        left, right = line[:at], line[at + 1 :]
        if at < 0 or left not in ids or right not in ids or left + right not in ids:
            raise ModelError(f"the GGUF file merges {line[:80]!r}, which are not two of its tokens that make a third")
        merges.append((left, right))
    return merges


def scored_merges(metadata: Mapping[str, Any], table: TokenTable, ids: Mapping[str, int]) -> list[Merge]:
    """The merges that SentencePiece does: of all neighbours that make a token, those that make the best one first."""
    scores = numbers(metadata, "scores", len(table.tokens))
    if scores is None or np.isnan(scores).any():
        raise ModelError("the GGUF file's tokenizer.ggml.scores are missing, or are not numbers")
    whole = np.isin(table.kinds, (UNKNOWN, CONTROL, BYTE))  # never made from pieces
    order = _best_first(scores, whole)
    lengths = np.fromiter(map(len, table.tokens), np.int64, len(table.tokens))[order]
    if lengths.sum() > MAX_SPLITS or lengths.max(initial=0) > MAX_PIECE_CHARS:
        raise ModelError(
            f"the GGUF file's pieces have more than {MAX_SPLITS} characters, or one has more than {MAX_PIECE_CHARS}"
        )
    return _cuts(
        [table.tokens[one] for one in order], ids.keys() - {table.tokens[one] for one in whole.nonzero()[0].tolist()}
    )


def _best_first(scores: npt.NDArray[Any], whole: npt.NDArray[np.bool_]) -> list[int]:
    """Ids of the pieces that can be made; of equal scores the first, which was learned first."""
    order = np.argsort(-scores.astype(np.float64), kind="stable")
    found: list[int] = order[~whole[order]].tolist()
    return found


def _cuts(pieces: Sequence[str], known: set[str]) -> list[Merge]:
    """Each piece cut in two wherever both halves are pieces."""
    merges = []
    for piece in pieces:
        for at in range(len(piece) - 1, 0, -1):
            left = piece[:at]
            if left in known:
                right = piece[at:]
                if right in known:
                    merges.append((left, right))
    return merges
