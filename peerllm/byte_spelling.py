"""How the tokens of a vocabulary are spelled: bytes that are no characters, and marks that are no text."""

from __future__ import annotations

import re

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # one byte, in vocabularies that fall back to bytes


def bytes_by_character() -> dict[str, int]:
    """How byte-level tokenizers write bytes: printable ones as they are, the others as characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [one for one in range(256) if one not in printable]
    return {chr(one): one for one in printable} | {chr(256 + at): one for at, one in enumerate(others)}


def is_mark(content: str, special: bool) -> bool:
    """Whether llguidance holds that an added token is no text. Qwen's `<tool_call>` is none, though its tokenizer says
    otherwise (`special`).
    """
    return special or (content.startswith("<") and content.endswith(">"))
