"""What every token id of a model stands for: all that turning ids into text takes.

A tokenizer of a large vocabulary takes some tenths of a second to be read, in which the whole process stands still.
This comes in slices from the process that has read one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tokenizers import AddedToken, Tokenizer

from peerllm.errors import ModelError

SLICE = 16 << 10  # tokens that are told at once
MAX_SOUGHT = 64  # tokens whose ids are asked for
MAX_IDS = 1 << 21  # eight times the largest vocabulary in use


class Decoding(Protocol):
    """The part of a tokenizers.Tokenizer that decoding takes."""

    @property
    def decoder(self) -> Any: ...

    def id_to_token(self, id: int) -> str | None: ...

    def token_to_id(self, token: str) -> int | None: ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]: ...


class DecodingTable:
    """A Decoding, from what `facts_of` and `tokens_from` tell of a tokenizer."""

    def __init__(self, facts: Mapping[str, Any], tokens: Sequence[str | None]) -> None:
        self.vocabulary: int = facts["vocabulary"]  # tokens
        self._tokens = tuple(tokens)
        self.decoder = Tokenizer.from_str(facts["shell"]).decoder
        self._numbers: dict[str, int | None] = {}  # of those that were asked for
        self._added = {number: (content, special) for number, content, special in facts["added"]}
        self._special = frozenset(content for content, special in self._added.values() if special)

    def id_to_token(self, id: int) -> str | None:
        """None: there is none."""
        return self._tokens[id] if 0 <= id < len(self._tokens) else None

    def token_to_id(self, token: str) -> int | None:
        """None: there is none. Meant for a few tokens, which are sought one by one."""
        if token not in self._numbers and len(self._numbers) < MAX_SOUGHT:
            self._numbers[token] = next((number for number, one in enumerate(self._tokens) if one == token), None)
        return self._numbers.get(token)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """As Tokenizer.decode does it."""
        hidden = self._special if skip_special_tokens else ()
        named = [token for one in ids if (token := self.id_to_token(one)) is not None and token not in hidden]
        return str(self.decoder.decode(named)) if self.decoder is not None else " ".join(named)

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        return {number: AddedToken(content, special=special) for number, (content, special) in self._added.items()}


def facts_of(tokenizer: Tokenizer, shell: str) -> dict[str, Any]:
    """`shell`: its file with the decoder, but without a vocabulary. "ids": how many `tokens_from` tells in all."""
    added, vocabulary = tokenizer.get_added_tokens_decoder().items(), tokenizer.get_vocab()
    ids = max([*vocabulary.values(), *(number for number, _ in added)], default=-1) + 1
    if ids > MAX_IDS:
        raise ModelError(f"a token has the id {ids - 1}; at most {MAX_IDS} are read")
    special = [(number, token.content, token.special) for number, token in added]
    return {"shell": shell, "added": special, "vocabulary": len(vocabulary), "ids": ids}


def tokens_from(tokenizer: Tokenizer, first: int) -> list[str | None]:
    """The next SLICE of them."""
    return [tokenizer.id_to_token(one) for one in range(first, first + SLICE)]
