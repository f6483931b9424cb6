"""An answer as it grows: token ids in, text out, and where it ends. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from peerllm.api.text.detokenizer import Detokenizer
from peerllm.api.text.reasoning import ReasoningSplitter
from peerllm.api.text.stops import StopScanner
from peerllm.engine.messages import FinishReason
from peerllm.errors import EngineError, UnavailableError


@dataclass(slots=True)
class GrowingAnswer:
    """Feed it every chunk; it says what text became certain and, once, why the answer ended."""

    detokenizer: Detokenizer
    scanner: StopScanner
    splitter: ReasoningSplitter
    finish: Literal["stop", "length"] | None = None
    ids: list[int] = field(default_factory=list)
    reused: int = 0  # tokens of the prompt that were computed for an earlier one

    def feed(self, ids: Sequence[int], finish: FinishReason | None, reused: int = 0) -> tuple[str, str]:
        """What is certain now of what the model thinks, and of its answer; raises where the answer broke off."""
        self.reused = max(self.reused, reused)
        text = ""
        for one in ids:  # singly, so that the text after so many tokens does not depend on how they came
            if not self.scanner.stopped:
                self.ids.append(one)
                text += self.scanner.push(self.detokenizer.push((one,)))
        if self.scanner.stopped:
            self.finish = "stop"
        elif finish == "error":
            raise EngineError("the answer broke off: a device or its engine failed; ask again")
        elif finish == "cancelled":
            raise UnavailableError("the answer was cancelled: the model was stopped or moved; ask again")
        elif finish is not None:
            text += self.scanner.push(self.detokenizer.flush())
            text += self.scanner.flush()
            self.finish = "stop" if self.scanner.stopped else finish
        thought, said = self.splitter.push(text)
        if self.finish is not None:
            more_thought, more_said = self.splitter.flush()
            thought, said = thought + more_thought, said + more_said
        return thought, said
