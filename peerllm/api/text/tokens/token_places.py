"""Which tokens of a growing answer stand behind the words that it says. No I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from peerllm.api.text.calls.answer_parts import AnswerPart, ToldToken, Words
from peerllm.api.text.tokens.token_bytes import TokenBytes
from peerllm.logprobs import unpacked


@dataclass(slots=True)
class _Placed:
    """A token, and which characters of the text it stands for, in whole or in part."""

    token_id: int
    logprobs: bytes
    first: bool
    start: int = 0
    end: int = 0


class TokenPlaces:
    """Shown every token of an answer with the text that came with it, and then the parts that came of that.

    Readers of answers leave out marks and space, and hold back what may become one, so words are sought in the text
    from its end, where they must be but for what is `held`.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._bytes = token_bytes
        self._waiting: list[_Placed] = []  # whose text has not come
        self._placed: deque[_Placed] = deque()
        self._end = 0  # characters of which the tokens are known
        self._begin, self._read = 0, ""  # what was read of the text and not told, and where it begins
        self._said = 0  # characters of words that were said
        self._first = True

    def push(self, token_id: int, logprobs: bytes, text: str) -> None:
        """The next token, and the text that is certain with it: of it and of those that waited."""
        self._waiting.append(_Placed(token_id, logprobs, self._first))
        self._first = False
        self.flush(text)

    def flush(self, text: str) -> None:
        """The text of those that wait."""
        if not text:
            return
        pieces = [self._bytes.of(one.token_id, one.first) for one in self._waiting]
        characters = [at for at, one in enumerate(text) for _ in one.encode()]
        known, at = b"".join(pieces) == text.encode(), 0
        for one, piece in zip(self._waiting, pieces, strict=True):
            own = characters[at : at + len(piece)] if known else range(len(text))
            one.start = self._end + (own[0] if own else min(at, len(text)))
            one.end = self._end + own[-1] + 1 if own else one.start + 1
            at += len(piece)
        self._placed += self._waiting
        self._waiting.clear()
        self._end += len(text)

    def told(self, text: str, parts: Sequence[AnswerPart], held: int) -> list[AnswerPart]:
        """The parts, words with their tokens. `text` was read to make them, `held` characters of it say nothing yet."""
        self._read += text
        if not parts:
            return []
        end = len(self._read) - held
        places = list[int]()
        for part in reversed(parts):
            end = max(0, self._read.rfind(part.text, 0, end)) if isinstance(part, Words) else end
            places.append(end)
        found = [
            self._words(part, self._begin + at) if isinstance(part, Words) else part
            for part, at in zip(parts, reversed(places), strict=True)
        ]
        last = parts[-1]
        gone = places[0] + len(last.text) if isinstance(last, Words) else len(self._read) - held
        self._begin, self._read = self._begin + gone, self._read[gone:]
        return found

    def _words(self, words: Words, start: int) -> Words:
        """With the tokens of the text from there on; those before it are no words, or were said."""
        end, tokens = start + len(words.text), list[ToldToken]()
        while self._placed and self._placed[0].start < end:
            one = self._placed.popleft()
            if one.end > start and one.logprobs and not words.thought:
                tokens.append(self._token(one, self._said + max(0, one.start - start)))
        if not words.thought:
            self._said += len(words.text)
        return replace(words, tokens=tuple(tokens))

    def _token(self, one: _Placed, offset: int) -> ToldToken:
        own, *likeliest = [
            (self._bytes.of(token, one.first), round(value, 6)) for token, value in unpacked(one.logprobs)
        ]
        return ToldToken(*own, offset, tuple(likeliest))
