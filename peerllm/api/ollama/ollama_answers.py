"""Answers of /api/chat and /api/generate: lines of JSON, the last one with counts and times."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from peerllm.api.core.answer_events import (
    AnswerBegins,
    AnswerEnds,
    AnswerEvent,
    AnswerWaits,
    TextDelta,
    ToolCallBegins,
    ToolCallDelta,
)
from peerllm.api.core.kept.repeat import Repeat
from peerllm.api.core.telling import Piece, WholeAnswer, WholeCall
from peerllm.api.error_answers import ErrorFacts, ErrorMore
from peerllm.api.ollama.ollama_objects import OllamaCall, OllamaCounts
from peerllm.api.text.calls.answer_parts import ToldToken
from peerllm.api.text.tokens.logprob_objects import logprob_objects

NS = 1e9  # nanoseconds of a second


class OllamaAnswers:
    """A telling.ToldForm. Lines have no place for what is done meanwhile, so those who wait hear nothing.

    A call is told when it is complete, since arguments are an object; one that is cut comes as text.
    """

    content_type = "application/x-ndjson"
    named = False

    def __init__(self, model: str, chat: bool) -> None:
        self._model, self._chat, self._since = model, chat, time.monotonic()
        self._call: WholeCall | None = None  # being written

    def whole(self, answers: Sequence[WholeAnswer]) -> object:
        (answer,) = answers
        told = [(one, _told(one)) for one in answer.calls]
        text = answer.text + "".join(one.as_text() for one, call in told if call is None)
        calls = [call for _, call in told if call is not None]
        return {**self._last(text, answer.thought, answer.ends, calls), **_logprobs(answer.logprobs)}

    def pieces(self, choice: int, event: AnswerEvent, repeat: Repeat | None) -> Iterator[Piece]:
        if self._call is not None and not isinstance(event, ToolCallDelta | AnswerWaits):
            told, text = _told(self._call), self._call.as_text()
            yield self._line("" if told else text, "", False, [told] if told else []), None
            self._call = None
        match event:
            case ToolCallBegins():
                self._call = WholeCall(event.id, event.name)
            case ToolCallDelta():
                if self._call is not None:
                    self._call.arguments += event.arguments
            case TextDelta():
                texts = ("", event.text) if event.thought else (event.text, "")
                yield {**self._line(*texts, False), **_logprobs(event.logprobs)}, None
            case AnswerEnds():
                yield self._last("", "", event), None
            case AnswerWaits() | AnswerBegins():
                pass

    def closing(self) -> Iterator[Piece]:
        yield from ()

    def loaded(self, reason: str) -> dict[str, Any]:
        """The answer to a request that says nothing: the model can answer, or ("unload") is not loaded any more."""
        return {**self._line("", "", True), "done_reason": reason}

    def _line(self, text: str, thought: str, done: bool, calls: Sequence[OllamaCall] = ()) -> dict[str, Any]:
        said: dict[str, Any] = {"role": "assistant", "content": text} if self._chat else {"response": text}
        if thought:
            said["thinking"] = thought
        if calls:
            said["tool_calls"] = list(calls)
        told = {"message": said} if self._chat else said
        return {"model": self._model, "created_at": stamp(time.time()), **told, "done": done}

    def _last(self, text: str, thought: str, ends: AnswerEnds, calls: Sequence[OllamaCall] = ()) -> dict[str, Any]:
        whole, usage, timings = time.monotonic() - self._since, ends.usage, ends.timings
        counts: OllamaCounts = {
            "done_reason": ends.reason,
            "total_duration": int(whole * NS),
            "load_duration": int(max(0.0, whole - timings.prompt_s - timings.answer_s) * NS),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": int(timings.prompt_s * NS),
            "eval_count": usage.answer_tokens,
            "eval_duration": int(timings.answer_s * NS),
        }
        context = {"context": list(ends.all_ids)} if ends.all_ids and not self._chat else {}
        return {**self._line(text, thought, True, calls), **counts, **context}


def _logprobs(tokens: Sequence[ToldToken]) -> dict[str, Any]:
    """What a line has of them, if they are told."""
    return {"logprobs": logprob_objects(tokens)} if tokens else {}


def _told(call: WholeCall) -> OllamaCall | None:
    given = call.given()
    return None if given is None else {"id": call.id, "function": {"name": call.name, "arguments": given}}


def stamp(seconds: float) -> str:
    """A Unix time as Ollama writes times."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class OllamaError(ErrorMore):
    error: str


def ollama_error(facts: ErrorFacts) -> OllamaError:
    """{"error": one line}, with what is ours beside it."""
    return {"error": facts.message, **facts.more}
