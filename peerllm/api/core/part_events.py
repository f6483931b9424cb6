"""The parts of an answer as events, with the tokens that they complete."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peerllm.api.core.answer_events import AnswerEvent, TextDelta, ToolCallBegins, ToolCallDelta
from peerllm.api.text.calls.answer_parts import AnswerPart, CallName, CallText


class PartEvents:
    """Shown all parts of one answer. Calls have ids that are the same each time an answer is read."""

    def __init__(self, answer_id: str) -> None:
        self._answer_id = answer_id
        self.calls = 0
        self.sent = 0  # tokens that are told

    def of(self, parts: Sequence[AnswerPart], ids: Sequence[int]) -> Iterator[AnswerEvent]:
        """`ids`: of the answer so far. The last event of several has them all: only behind it a reader has the rest."""
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
                yield TextDelta(part.text, fresh, self.sent, part.thought)
