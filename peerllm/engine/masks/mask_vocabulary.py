"""A tokenizer as far as masks need it: what bytes each token stands for, without the merges, which take most memory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

from msgspec import MsgspecError, Struct, field
from msgspec.json import decode

from peerllm.byte_spelling import BYTE_TOKEN, bytes_by_character, is_mark

SPACE = "▁"  # as SentencePiece writes a space
MAX_WORDS = 4096  # whose tokens are remembered
MAX_IDS = 1 << 21  # eight times the largest vocabulary in use
_WORD = re.compile(r" ?[^ ]{1,64}| {1,64}", re.DOTALL)


class _Model(Struct):
    vocab: dict[str, int]
    type: str = ""


class _Added(Struct):
    id: int
    content: str
    special: bool = False


class _File(Struct):
    """Of a tokenizer.json. Its merges, which have several times the size, are skipped while it is read."""

    model: _Model
    added_tokens: list[_Added] = field(default_factory=list)
    decoder: Any = None


class MaskVocabulary:
    """What llguidance asks a tokenizer: bytes of tokens, and the tokens of a text that it forces on an answer.

    Pieces are joined as byte pair encoding does it, those first whose token has the lowest id: merges have that order.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], end: int, plain: Mapping[int, int]) -> None:
        """`plain`: for tokens of one byte others of the same, which are preferred."""
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, end
        self._plain = plain
        self._words = lru_cache(MAX_WORDS)(self._encoded)
        self.known: Any = None  # the LLTokenizer of these tokens

    def __call__(self, text: str) -> list[int]:
        return [one for word in _WORD.findall(text) for one in self._words(word)]

    def _encoded(self, word: str) -> list[int]:
        parts = list(word)
        while True:
            joined = [self._longest(a + b) for a, b in pairwise(parts)]
            found = [(ids[0], at) for at, ids in enumerate(joined) if len(ids) == 1]
            if not found:
                return [one for part in parts for one in self._longest(part)]
            at = min(found)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    def _longest(self, text: str) -> list[int]:
        """In the longest tokens, from the left."""
        return [self._plain.get(one, one) for one in self.known.greedy_tokenize(text)]


def mask_tokenizer(data: bytes, stop_ids: Sequence[int]) -> Any:
    """The LLTokenizer of a tokenizer.json. Kinds that are not known here take three times the memory, and the time."""
    from llguidance import LLTokenizer

    ends = list(stop_ids) or None
    vocabulary = _vocabulary(data, stop_ids[0] if stop_ids else 0)
    if vocabulary is None:
        return LLTokenizer(data.decode(), eos_token=ends)
    vocabulary.known = LLTokenizer(cast(Any, vocabulary), eos_token=ends, slices=[])
    vocabulary.tokens = ()
    return vocabulary.known.with_slices(LLTokenizer.general_slices())


def _vocabulary(data: bytes, end: int) -> MaskVocabulary | None:
    try:
        file = decode(data, type=_File)
    except MsgspecError:
        return None
    steps = str(file.decoder)
    level, fallback = "'ByteLevel'" in steps, "'ByteFallback'" in steps
    names, added = file.model.vocab, file.added_tokens
    if file.model.type != "BPE" or not names or level == fallback:
        return None
    # Libraries renumber the added tokens of a file, so that nobody has looked at these numbers before.
    numbers = [*names.values(), *(one.id for one in added), end]
    if not 0 <= min(numbers) <= max(numbers) < MAX_IDS:
        raise ValueError(f"a token has an id that is not from 0 to {MAX_IDS - 1}")
    tokens = [b""] * (max(numbers) + 1)
    byte_of = {ord(character): byte for character, byte in bytes_by_character().items()}
    of_bytes = dict[bytes, int]()
    for name, number in names.items():
        if level and all(ord(one) in byte_of for one in name):
            tokens[number] = name.translate(byte_of).encode("latin-1")
        elif fallback and (byte := BYTE_TOKEN.fullmatch(name)):
            of_bytes[bytes.fromhex(byte[1])] = number
            tokens[number] = bytes.fromhex(byte[1])
        else:
            tokens[number] = name.encode() if level else name.replace(SPACE, " ").encode()
    for one in added:
        tokens[one.id] = one.content.encode()
    plain = {
        of_bytes[token]: number
        for number, token in enumerate(tokens)
        if token in of_bytes and of_bytes[token] != number
    }
    marks = [one.id for one in added if is_mark(one.content, one.special)]
    return MaskVocabulary(tokens, marks, end, plain)
