"""An answer as it grows: token ids in, its parts out, and where it ends. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from peerllm.api.text.calls.answer_parts import AnswerPart, AnswerReader, joined
from peerllm.api.text.detokenizer import Detokenizer
from peerllm.api.text.stops import StopScanner
from peerllm.api.text.tokens.token_places import TokenPlaces
from peerllm.engine.messages import FinishReason
from peerllm.errors import EngineError, UnavailableError


@dataclass(slots=True)
class GrowingAnswer:
    """Feed it every chunk; it says what became certain and, once, why the answer ended."""

    detokenizer: Detokenizer
    scanner: StopScanner
    reader: AnswerReader
    places: TokenPlaces | None = None  # where words are to come with their tokens
    finish: Literal["stop", "length"] | None = None
    ids: list[int] = field(default_factory=list)
    reused: int = 0  # tokens of the prompt that were computed for an earlier one

    @property
    def stopped(self) -> bool:
        """Whether tokens that come are of no use: a stop string or the only call that is wanted is behind them."""
        return self.scanner.stopped or self.reader.stopped

    def feed(
        self, ids: Sequence[int], finish: FinishReason | None, reused: int = 0, logprobs: Sequence[bytes] = ()
    ) -> list[AnswerPart]:
        """What is certain now; raises where the answer broke off. `logprobs`: of each id, as Chunk has them."""
        self.reused = max(self.reused, reused)
        parts: list[AnswerPart] = []
        # Singly, so that the text after so many tokens does not depend on how they came.
        for at, one in enumerate(ids):
            if not self.stopped:
                self.ids.append(one)
                text = self.detokenizer.push((one,))
                if self.places is not None and self.detokenizer.shows(one):
                    self.places.push(one, logprobs[at] if logprobs else b"", text)
                parts += self._read(self.scanner.push(text))
        if self.stopped:
            self.finish = "stop"
        elif finish == "error":
            raise EngineError("the answer broke off: a device or its engine failed; ask again")
        elif finish == "cancelled":
            raise UnavailableError("the answer was cancelled: the model was stopped or moved; ask again")
        elif finish is not None:
            text = self.detokenizer.flush()
            if self.places is not None:
                self.places.flush(text)
            parts += self._read(self.scanner.push(text) + self.scanner.flush())
            self.finish = "stop" if self.stopped else finish
        if self.finish is not None:
            parts += self._placed("", self.reader.flush())
        return joined(parts)

    def _read(self, text: str) -> list[AnswerPart]:
        return self._placed(text, self.reader.push(text))

    def _placed(self, text: str, parts: list[AnswerPart]) -> list[AnswerPart]:
        return parts if self.places is None else self.places.told(text, parts, self.reader.held)
