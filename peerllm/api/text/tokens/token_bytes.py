"""What bytes a token stands for, also one that is but a piece of a character."""

from __future__ import annotations

import orjson

from peerllm.api.text.tokens.decoding_table import Decoding
from peerllm.byte_spelling import BYTE_TOKEN, bytes_by_character

_ANCHORS = ("a", "▁a", "A", "0")  # one of them stands before a token that is decoded in the middle of a text


class TokenBytes:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Decoding) -> None:
        self._tokenizer = tokenizer
        self._added = {number: token.content.encode() for number, token in tokenizer.get_added_tokens_decoder().items()}
        kinds = _kinds(orjson.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {})
        self._byte_of = bytes_by_character() if "ByteLevel" in kinds else {}
        self._fallback = "ByteFallback" in kinds
        anchors = (tokenizer.token_to_id(one) for one in _ANCHORS)
        self._anchor: list[int] = next(([one] for one in anchors if one is not None), [])
        self._before = self._text(self._anchor)

    def of(self, token_id: int, first: bool = False) -> bytes:
        """In the middle of a text, or `first` of it, where some decoders leave a space out; b"": there is no such."""
        if token_id in self._added:
            return self._added[token_id]
        name: str | None = self._tokenizer.id_to_token(token_id)
        if name is None:
            return b""
        if self._fallback and (byte := BYTE_TOKEN.fullmatch(name)):
            return bytes.fromhex(byte[1])
        if self._byte_of and all(one in self._byte_of for one in name):
            return bytes(self._byte_of[one] for one in name)
        text = self._text([token_id] if first else [*self._anchor, token_id])
        return (text if first else text.removeprefix(self._before)).encode()

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


def _kinds(decoder: dict[str, object]) -> set[str]:
    """Of a decoder and those in it."""
    inner = decoder.get("decoders")
    found = {str(decoder.get("type"))}
    return found.union(*map(_kinds, inner)) if isinstance(inner, list) else found
