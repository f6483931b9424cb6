"""Fills rows of a fixed length with whole dialogues; a seed gives the same rows on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from tokenizers import Tokenizer
from torch import Tensor

from peerllm.builtin.chat_format import encode, render
from peerllm.builtin.exchanges.dialogues import KINDS, dialogues

HEARD_WEIGHT = 0.1  # weight of the loss on the user's tokens; the model's own weigh 1
_AT_ONCE = 400  # dialogues encoded together


class Packer:
    """An endless stream of training rows from one seed and one mix."""

    def __init__(self, tokenizer: Tokenizer, seed: int, kinds: dict[str, float] = KINDS, skip: int = 0) -> None:
        self._tokenizer = tokenizer
        self._dialogues = islice(dialogues(seed, kinds), skip, None)
        self._encoded: Iterator[tuple[list[int], list[bool]]] = iter(())
        self.drawn = skip  # number of dialogues drawn so far
        self._left: tuple[list[int], list[float]] = ([], [])

    def _next(self) -> tuple[list[int], list[float]]:
        found = next(self._encoded, None)
        if found is None:
            texts = [render(dialogue) for dialogue in islice(self._dialogues, _AT_ONCE)]
            self.drawn += len(texts)
            self._encoded = iter(encode(self._tokenizer, texts))
            found = next(self._encoded)
        ids, spoken = found
        return ids, [1.0 if said else HEARD_WEIGHT for said in spoken]

    def rows(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Token ids and loss weights, both (count, length + 1); a row begins with a dialogue."""
        all_ids, all_weights = [], []
        for _ in range(count):
            ids, weights = self._left
            self._left = ([], [])
            while len(ids) < length + 1:
                more, their_weights = self._next()
                if ids and len(ids) + len(more) > length + 1 and len(more) <= length + 1:
                    self._left = (more, their_weights)  # kept whole for the next row
                ids, weights = ids + more, weights + their_weights
            all_ids.append(ids[: length + 1])
            all_weights.append(weights[: length + 1])
        return torch.tensor(all_ids), torch.tensor(all_weights)
