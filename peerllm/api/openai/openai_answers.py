"""What OpenAI's two kinds of answers share: the head of every object, the usage, how a stream is framed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from peerllm.api.core.answer_events import (
    AnswerBegins,
    AnswerEnds,
    AnswerEvent,
    AnswerWaits,
    TextDelta,
    ToolCallBegins,
    ToolCallDelta,
    Usage,
)
from peerllm.api.core.kept.repeat import ALL_TOKENS, END, Repeat
from peerllm.api.core.telling import Piece, WholeAnswer
from peerllm.api.openai.openai_objects import (
    AnswerHead,
    ChatLogprobs,
    ChatPart,
    ChatPartDelta,
    OpenAIUsage,
    TextLogprobs,
    TextPart,
)
from peerllm.api.streams import SSE, comment
from peerllm.api.text.calls.answer_parts import ToldToken


class OpenAIAnswers:
    """A telling.ToldForm. All choices share the id and the time of the one that begins first."""

    content_type = SSE
    named = False
    prefix: str  # of ids
    whole_kind: str
    chunk_kind: str

    def __init__(self, prompts: int, with_ids: bool, with_usage: bool) -> None:
        self._per_prompt, self._with_ids, self._with_usage = prompts, with_ids, with_usage
        self._begins: AnswerBegins | None = None
        self._usages: dict[int, Usage] = {}
        self._places: dict[int, Repeat] = {}

    def choice(self, answer: WholeAnswer, index: int) -> ChatPart | TextPart:
        """The part of a whole object that is one answer."""
        raise NotImplementedError

    def opening(self, index: int) -> ChatPartDelta | TextPart | None:
        """What a stream's first chunk of an answer has, None if there is none."""
        raise NotImplementedError

    def delta(self, text: str, thought: bool = False) -> ChatPartDelta | TextPart:
        """More text in a chunk; "" is the chunk that ends the answer."""
        raise NotImplementedError

    def logprobs(self, tokens: Sequence[ToldToken]) -> ChatLogprobs | TextLogprobs:
        """What is told of the log probabilities of an answer's tokens."""
        raise NotImplementedError

    def call(self, event: ToolCallBegins | ToolCallDelta) -> ChatPartDelta:
        """A call of a tool in a chunk, or more of its arguments."""
        raise NotImplementedError

    def whole(self, answers: Sequence[WholeAnswer]) -> object:
        self._usages = {index: one.ends.usage for index, one in enumerate(answers)}
        choices = []
        for index, answer in enumerate(answers):
            logprobs = self.logprobs(answer.logprobs) if answer.logprobs else None
            choice = {"index": index, **self.choice(answer, index), "logprobs": logprobs}
            choice["finish_reason"] = _reason(answer.ends)
            if self._with_ids:
                choice["token_ids"] = answer.ids
            choices.append(choice)
        return {**self._head(answers[0].begins, self.whole_kind), "choices": choices, "usage": self._usage()}

    def pieces(self, choice: int, event: AnswerEvent, repeat: Repeat | None) -> Iterator[Piece]:
        """With a key, events have ids: where in the answer they end."""
        if repeat is not None:
            place = self._places.setdefault(choice, replace(repeat))
            place.note(event)
        match event:
            case AnswerWaits():
                yield comment(event.note), None
            case AnswerBegins():
                self._begins = self._begins or event
                opening = self.opening(choice)
                if opening is not None and (repeat is None or repeat.had is None):
                    yield self._chunk(choice, opening, (), None), None if repeat is None else "0"
            case TextDelta():
                number = None if repeat is None else self._places[choice].place
                chunk = self._chunk(choice, self.delta(event.text, event.thought), event.ids, None, event.logprobs)
                yield chunk, number
            case ToolCallBegins() | ToolCallDelta():
                number = None if repeat is None else self._places[choice].place
                yield self._chunk(choice, self.call(event), event.ids, None), number
            case AnswerEnds():
                self._usages[choice] = event.usage
                if repeat is None or repeat.had != ALL_TOKENS:
                    chunk = self._chunk(choice, self.delta(""), event.ids, _reason(event))
                    yield chunk, None if repeat is None else END

    def closing(self) -> Iterator[Piece]:
        if self._with_usage and self._begins is not None:
            yield {**self._head(self._begins, self.chunk_kind), "choices": [], "usage": self._usage()}, None
        yield b"data: [DONE]\n\n", None

    def _chunk(
        self,
        index: int,
        part: ChatPartDelta | TextPart,
        ids: Sequence[int],
        reason: str | None,
        tokens: Sequence[ToldToken] = (),
    ) -> dict[str, Any]:
        assert self._begins is not None
        logprobs = self.logprobs(tokens) if tokens else None
        choice: dict[str, Any] = {"index": index, **part, "logprobs": logprobs, "finish_reason": reason}
        if self._with_ids:
            choice["token_ids"] = list(ids)
        found = {**self._head(self._begins, self.chunk_kind), "choices": [choice]}
        if self._with_usage:
            found["usage"] = None
        return found

    def _head(self, begins: AnswerBegins, kind: str) -> AnswerHead:
        return {
            "id": self.prefix + begins.id,
            "object": kind,
            "created": begins.created,
            "model": begins.model,
            "system_fingerprint": None,
        }

    def _usage(self) -> OpenAIUsage:
        """Each prompt counts once, however many answers there are to it."""
        prompts = [usage for index, usage in self._usages.items() if index % self._per_prompt == 0]
        prompt = sum(usage.prompt_tokens for usage in prompts)
        said = sum(usage.answer_tokens for usage in self._usages.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": said,
            "total_tokens": prompt + said,
            "prompt_tokens_details": {"cached_tokens": sum(one.reused_tokens for one in prompts)},
        }


def _reason(ends: AnswerEnds) -> str:
    """An answer that was cut says so, whatever it was about to call."""
    return "tool_calls" if ends.calls and ends.reason == "stop" else ends.reason
