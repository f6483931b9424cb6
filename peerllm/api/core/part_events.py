"""The parts of an answer as events, with the tokens that they complete."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peerllm.api.core.answer_events import AnswerEvent, TextDelta, ToolCallBegins, ToolCallDelta
from peerllm.api.text.calls.answer_parts import AnswerPart, CallName, CallText, Words

MAX_TOLD = 2048  # tokens with log probabilities in one event, which have a kilobyte each at most


class PartEvents:
    """Shown all parts of one answer. Calls have ids that are the same each time an answer is read."""

    def __init__(self, answer_id: str) -> None:
        self._answer_id = answer_id
        self.calls = 0
        self.sent = 0  # tokens that are told

    def of(self, parts: Sequence[AnswerPart], ids: Sequence[int]) -> Iterator[AnswerEvent]:
        """`ids`: of the answer so far. The last event of several has them all: only behind it a reader has the rest."""
        parts = [piece for part in parts for piece in _pieces(part)]
        for number, part in enumerate(parts, 1):
            last = number == len(parts)
            fresh = tuple(ids[self.sent :]) if last else ()
            self.sent = len(ids) if last else self.sent
            if isinstance(part, CallName):
                self.calls += 1
                call_id = f"call_{self._answer_id}{self.calls - 1}"
                yield ToolCallBegins(self.calls - 1, call_id, part.name, fresh, self.sent)
            elif isinstance(part, CallText):
                yield ToolCallDelta(self.calls - 1, part.text, fresh, self.sent)
            else:
                yield TextDelta(part.text, fresh, self.sent, part.thought, part.tokens)


def _pieces(part: AnswerPart) -> Iterator[AnswerPart]:
    """Words that are told with very many tokens, as several."""
    while isinstance(part, Words) and len(part.tokens) > MAX_TOLD:
        at = part.tokens[MAX_TOLD].offset - part.tokens[0].offset
        yield Words(part.text[:at], tokens=part.tokens[:MAX_TOLD])
        part = Words(part.text[at:], tokens=part.tokens[MAX_TOLD:])
    yield part
