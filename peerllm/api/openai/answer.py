"""An answer as it grows: token ids in, text out, and where it ends. No I/O."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peerllm.api.text.detokenizer import Detokenizer
from peerllm.api.text.stops import StopScanner
from peerllm.engine.messages import FinishReason
from peerllm.errors import EngineError, UnavailableError


@dataclass(slots=True)
class Completion:
    """Feed it every chunk; it says what text became certain and, once, why the answer ended."""

    detokenizer: Detokenizer
    scanner: StopScanner
    finish: str | None = None
    ids: list[int] = field(default_factory=list)
    reused: int = 0  # tokens of the prompt that were computed for an earlier one

    def feed(self, ids: Sequence[int], finish: FinishReason | None, reused: int = 0) -> str:
        """The text that is certain now; raises where the answer broke off."""
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
        return text


@dataclass(frozen=True, slots=True)
class OpenAIObjects:
    """The parts of one answer as OpenAI's clients read them; all parts share one id and one time."""

    model: str
    prompt_tokens: int
    with_ids: bool = False
    with_usage: bool = False
    id: str = field(default_factory=lambda: "chatcmpl-" + secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def role(self) -> dict[str, Any]:
        """The first chunk: who speaks, and nothing yet."""
        return self._chunk({"role": "assistant", "content": ""}, [], None)

    def delta(self, text: str, ids: Sequence[int]) -> dict[str, Any]:
        return self._chunk({"content": text}, ids, None)

    def finish(self, reason: str, ids: Sequence[int]) -> dict[str, Any]:
        """The last chunk of the choice: an empty delta with the reason."""
        return self._chunk({}, ids, reason)

    def usage(self, answer: Completion) -> dict[str, Any]:
        """After the choice, if the client asked for it: no choices, only counts."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(answer)}

    def whole(self, text: str, answer: Completion) -> dict[str, Any]:
        """The answer in one piece."""
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": answer.finish,
        }
        if self.with_ids:
            choice["token_ids"] = answer.ids
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage(answer)}

    def _chunk(self, delta: dict[str, str], ids: Sequence[int], reason: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        if self.with_ids:
            choice["token_ids"] = list(ids)
        found = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self.with_usage:
            found["usage"] = None
        return found

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": None}

    def _usage(self, answer: Completion) -> dict[str, Any]:
        prompt, said = self.prompt_tokens, len(answer.ids)
        counts = {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}
        return {**counts, "prompt_tokens_details": {"cached_tokens": answer.reused}}
