"""Reads answers that may begin with what the model thinks, and may call tools behind it."""

from __future__ import annotations

from peerllm.api.text.calls.answer_parts import AnswerPart, Words, joined
from peerllm.api.text.calls.call_reader import CallReader
from peerllm.api.text.reasoning import ReasoningSplitter


class ThinkingReader:
    """An AnswerReader. `calls` None: no tools are offered."""

    def __init__(self, splitter: ReasoningSplitter, calls: CallReader | None = None) -> None:
        self._splitter, self._calls = splitter, calls

    @property
    def done(self) -> bool:
        return self._calls is None and self._splitter.done

    @property
    def stopped(self) -> bool:
        return self._calls is not None and self._calls.stopped

    @property
    def held(self) -> int:
        return self._splitter.held + (self._calls.held if self._calls is not None else 0)

    def push(self, text: str) -> list[AnswerPart]:
        return self._parts(*self._splitter.push(text))

    def flush(self) -> list[AnswerPart]:
        parts = self._parts(*self._splitter.flush())
        return joined([*parts, *self._calls.flush()]) if self._calls is not None else parts

    def _parts(self, thought: str, said: str) -> list[AnswerPart]:
        more: list[AnswerPart] = [Words(said)] if self._calls is None else self._calls.push(said)
        return joined([Words(thought, True), *more])
