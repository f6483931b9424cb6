"""How much text a context can hold at most, as far as a tokenizer's file tells: for refusals before any encoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import pre_tokenizers

NFC_SHRINKS = 4  # composing characters makes a text at most so many times shorter
_KEEPING = {"ByteLevel", "Metaspace", "Digits", "Split"}  # pre-tokenizers that drop nothing of the text
_REMOVED = "Removed"


@dataclass(frozen=True, slots=True)
class TextBounds:
    """`token_bytes` of UTF-8 text is the most that one token stands for; 0: no bound is certain."""

    token_bytes: int
    spaces_vanish: bool = False  # next to special tokens, so that only other characters count

    def most_bytes(self, tokens: int) -> int:
        """The longest text that so many tokens may stand for."""
        return tokens * self.token_bytes

    def too_long(self, text: str, tokens: int) -> bool:
        """Whether the text certainly takes more tokens than that."""
        most = self.most_bytes(tokens)
        if not self.token_bytes or 4 * len(text) <= most or len(text.encode()) <= most:
            return False
        return not self.spaces_vanish or len("".join(text.split()).encode()) > most


def bounds_of(tokenizer: Mapping[str, Any]) -> TextBounds:
    """Of a tokenizer.json. Certain only where every byte of a text ends in some token."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens") or ()
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(vocabulary, dict):
        return TextBounds(0)
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    shrinks = 1
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        shrinks *= _shrinks(step)
    byte_level = any(step.get("type") == "ByteLevel" for step in steps)
    if byte_level:
        complete = all(character in vocabulary for character in pre_tokenizers.ByteLevel.alphabet())
    else:
        complete = bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    kept = all(step.get("type") in _KEEPING and step.get("behavior") != _REMOVED for step in steps)
    if not (complete and kept and shrinks):
        return TextBounds(0)
    longest = max(map(len, vocabulary)) if byte_level else max(len(token.encode()) for token in vocabulary)
    specials = [one for one in added if isinstance(one, dict)]
    longest = max([longest, *(len(str(one.get("content", "")).encode()) for one in specials)])
    return TextBounds(longest * shrinks, any(one.get("lstrip") or one.get("rstrip") for one in specials))


def _steps(one: object, inner: str) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as its parts in order."""
    if not isinstance(one, dict):
        return []
    if one.get("type") != "Sequence":
        return [one]
    return [step for part in one.get(inner) or () for step in _steps(part, inner)]


def _shrinks(step: Mapping[str, Any]) -> int:
    """How many times shorter it makes a text at most; 0: unknown."""
    match step.get("type"):
        case "Prepend":
            return 1
        case "NFC":
            return NFC_SHRINKS
        case "Replace":
            pattern = step.get("pattern")
            literal = pattern.get("String") if isinstance(pattern, dict) else None
            if literal and len(str(step.get("content", "")).encode()) >= len(str(literal).encode()):
                return 1
    return 0
