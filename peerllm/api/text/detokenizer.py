"""Token ids to text as they come; the pieces joined are the text of all ids decoded at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peerllm.api.text.tokens.decoding_table import Decoding
from peerllm.byte_spelling import BYTE_TOKEN

_UNDECODED = "\ufffd"  # what an unfinished UTF-8 character decodes to


def special_ids(tokenizer: Decoding) -> frozenset[int]:
    """The ids that stand for no text."""
    return frozenset(number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special)


class Detokenizer:
    """Decodes a window that starts at the last piece given out, so that spacing depends on what stood before.

    Held back: an unfinished character, and a run of byte tokens, whose text a later byte may still change.
    `shown`: special ids that have a text all the same; then `silent` names the others.
    """

    def __init__(self, tokenizer: Decoding, silent: frozenset[int], shown: frozenset[int] = frozenset()) -> None:
        self._decode: Callable[..., str] = tokenizer.decode
        self._name: Callable[[int], str | None] = tokenizer.id_to_token
        self._silent = silent  # ids without text
        self._hides = not shown
        self._window: list[int] = []
        self._given_ids = 0  # of the window: decoded and given out
        self._given_text = ""  # what those decode to

    def shows(self, token_id: int) -> bool:
        """Whether it has a text."""
        return token_id not in self._silent and self._name(token_id) is not None

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain after these ids."""
        self._window.extend(filter(self.shows, ids))
        if not self._window or BYTE_TOKEN.fullmatch(self._name(self._window[-1]) or ""):
            return ""
        text = self._text(self._window)
        if text.endswith(_UNDECODED) or not text.startswith(self._given_text):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """The text of what was held back; no more ids come."""
        return self._advance(self._text(self._window))

    def _text(self, ids: list[int]) -> str:
        return self._decode(ids, skip_special_tokens=self._hides)

    def _advance(self, text: str) -> str:
        piece = text[len(self._given_text) :]
        if piece:
            del self._window[: self._given_ids]
            self._given_ids = len(self._window)
            self._given_text = self._text(self._window)
        return piece
