"""Answers of /v1/responses: a response, or the events from its creation to its completion."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

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
from peerllm.api.core.kept.repeat import Repeat
from peerllm.api.core.telling import Piece, WholeAnswer, WholeCall
from peerllm.api.error_answers import ErrorFacts, HouseholdError, household_error
from peerllm.api.openai.responses.response_objects import (
    ItemStatus,
    ResponseObject,
    ResponsePart,
    ResponseUsage,
    ToldItem,
    ToldRequest,
)
from peerllm.api.openai.responses.response_requests import NAMES
from peerllm.api.streams import SSE, comment
from peerllm.api.text.tokens.logprob_objects import TokenLogprob, logprob_objects

_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class TextKind:
    """How one kind of item tells its text: where its one part is, and what the events about it are called."""

    prefix: str
    parts: str
    index: str
    part_event: str
    text_event: str
    part: ResponsePart
    logprobs: bool  # whether they are told of it


_SAID = TextKind(
    "msg", "content", "content_index", "response.content_part", "response.output_text",
    {"type": "output_text", "text": "", "annotations": [], "logprobs": []}, True,
)  # fmt: skip
# Of the events that tell thoughts, OpenAI and the specification have only those of summaries in common.
_THOUGHT = TextKind(
    "rs", "summary", "summary_index", "response.reasoning_summary_part", "response.reasoning_summary_text",
    {"type": "summary_text", "text": ""}, False,
)  # fmt: skip
_EMPTY: Mapping[str, Mapping[str, Any]] = {
    "msg": {"type": "message", "role": "assistant", "content": []},
    "rs": {"type": "reasoning", "summary": []},
}


class ResponseAnswers:
    """A telling.ToldForm. An answer's items: what the model thinks, what it says, and each call of a tool.

    `told`: what the response tells of its request; `keep` is given it when it is complete.
    """

    content_type = SSE
    named = True

    def __init__(self, told: ToldRequest, keep: Callable[[ResponseObject], None]) -> None:
        self._told, self._keep = told, keep
        self._begins: AnswerBegins | None = None
        self._number = 0  # of events
        self._output: list[ToldItem] = []  # items that are over, and the open one
        self._open: TextKind | WholeCall | None = None
        self._pieces: list[str] = []  # of the open item's text
        self._logprobs: list[TokenLogprob] = []  # of it
        self._thought_tokens = 0

    def whole(self, answers: Sequence[WholeAnswer]) -> object:
        (answer,) = answers
        self._begins, self._thought_tokens = answer.begins, answer.thought_tokens
        if answer.thought:
            self._take(TextDelta(answer.thought, (), 0, True))
        if answer.text:
            self._take(TextDelta(answer.text, (), 0, logprobs=tuple(answer.logprobs)))
        for index, call in enumerate(answer.calls):
            self._take(ToolCallBegins(index, call.id, call.name, (), 0))
            self._take(ToolCallDelta(index, call.arguments, (), 0))
        self._take(answer.ends)
        return self._ended(answer.ends)

    def _take(self, event: TextDelta | ToolCallBegins | ToolCallDelta | AnswerEnds) -> None:
        for _ in self._items(event):
            pass

    def pieces(self, choice: int, event: AnswerEvent, repeat: Repeat | None) -> Iterator[Piece]:
        match event:
            case AnswerWaits():
                yield comment(event.note), None
            case AnswerBegins():
                self._begins = event
                for name in ("created", "in_progress"):
                    yield self._event(f"response.{name}", response=self._response("in_progress", None)), None
            case TextDelta() | ToolCallBegins() | ToolCallDelta():
                self._thought_tokens += len(event.ids) if isinstance(event, TextDelta) and event.thought else 0
                for told in self._items(event):
                    yield told, None
            case AnswerEnds():
                for told in self._items(event):
                    yield told, None
                response = self._ended(event)
                yield self._event(f"response.{response['status']}", response=response), None

    def closing(self) -> Iterator[Piece]:
        yield _DONE, None

    def failing(self, facts: ErrorFacts) -> Iterator[object]:
        """The last words of a stream that breaks off."""
        error = responses_error(facts)["error"]
        flat = {"code": error["code"], "message": error["message"], "param": error["param"]}
        yield self._event("error", **flat, error=error)
        if self._begins is not None:
            code = "rate_limit_exceeded" if facts.status == 429 else "server_error"
            failed = self._response("failed", None)
            failed["error"] = {"code": code, "message": facts.message}
            yield self._event("response.failed", response=failed)
        yield _DONE

    def _items(self, event: TextDelta | ToolCallBegins | ToolCallDelta | AnswerEnds) -> Iterator[dict[str, Any]]:
        match event:
            case TextDelta():
                yield from self._text(_THOUGHT if event.thought else _SAID, event.text, logprob_objects(event.logprobs))
            case ToolCallBegins():
                yield from self._close("completed")
                self._open = WholeCall(event.id, event.name)
                yield self._added(_call(self._item_id("fc"), self._open, "in_progress"))
            case ToolCallDelta():
                self._pieces.append(event.arguments)
                if event.arguments:
                    yield self._of_item("response.function_call_arguments.delta", delta=event.arguments)
            case AnswerEnds():
                cut = event.reason == "length"
                yield from self._close("incomplete" if cut else "completed")
                if not self._output or (not cut and self._output[-1]["type"] == "reasoning"):
                    yield from self._text(_SAID, "")
                    yield from self._close("incomplete" if cut else "completed")

    def _text(self, kind: TextKind, text: str, logprobs: Sequence[TokenLogprob] = ()) -> Iterator[dict[str, Any]]:
        if self._open is not kind:
            yield from self._close("completed")
            self._open = kind
            item = {"id": self._item_id(kind.prefix), **_EMPTY[kind.prefix], "status": "in_progress"}
            yield self._added(cast("ToldItem", item))
            yield self._of_item(f"{kind.part_event}.added", kind, part=kind.part)
        if text:
            self._pieces.append(text)
            self._logprobs += logprobs
            yield self._of_item(f"{kind.text_event}.delta", kind, delta=text, **_logprobs(kind, logprobs))

    def _close(self, status: ItemStatus) -> Iterator[dict[str, Any]]:
        """The open item is over; a call whose arguments are whole is complete however the answer ends."""
        text, logprobs, open_item = "".join(self._pieces), self._logprobs, self._open
        self._pieces, self._logprobs, self._open = [], [], None
        if isinstance(open_item, TextKind):
            told = _logprobs(open_item, logprobs)
            part = {**open_item.part, "text": text, **told}
            self._output[-1] = cast("ToldItem", {**self._output[-1], open_item.parts: [part], "status": status})
            yield self._of_item(f"{open_item.text_event}.done", open_item, text=text, **told)
            yield self._of_item(f"{open_item.part_event}.done", open_item, part=part)
        elif open_item is not None:
            open_item.arguments = text
            if status == "completed" or (text and open_item.given() is not None):
                status = "completed"
                yield self._of_item("response.function_call_arguments.done", arguments=open_item.arguments)
            self._output[-1] = _call(self._output[-1]["id"], open_item, status)
        else:
            return
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=self._output[-1])

    def _added(self, item: ToldItem) -> dict[str, Any]:
        self._output.append(item)
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _of_item(self, name: str, kind: TextKind | None = None, **more: Any) -> dict[str, Any]:
        """An event about the last item, or about the one part that it has."""
        place: dict[str, Any] = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return self._event(name, **place, **({kind.index: 0} if kind is not None else {}), **more)

    def _event(self, name: str, **more: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": name, "sequence_number": self._number - 1, **more}

    def _item_id(self, prefix: str) -> str:
        assert self._begins is not None
        return f"{prefix}_{self._begins.id}_{len(self._output)}"

    def _ended(self, ends: AnswerEnds) -> ResponseObject:
        cut = ends.reason == "length"
        found = self._response("incomplete" if cut else "completed", _usage(ends.usage, self._thought_tokens))
        if cut:
            found["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            found["completed_at"] = int(time.time())
        self._keep(found)
        return found

    def _response(
        self, status: Literal["in_progress", "completed", "incomplete", "failed"], usage: ResponseUsage | None
    ) -> ResponseObject:
        begins = self._begins
        assert begins is not None
        return {
            "id": f"resp_{begins.id}",
            "object": "response",
            "created_at": begins.created,
            "completed_at": None,
            "status": status,
            "model": begins.model,
            "output": self._output,
            "error": None,
            "incomplete_details": None,
            "usage": usage,
            "temperature": begins.temperature,
            "top_p": begins.top_p,
            **self._told,
        }


def responses_error(facts: ErrorFacts) -> HouseholdError:
    """OpenAI's, with the names that fields have here."""
    found = household_error(facts)
    found["error"]["param"] = NAMES.get(facts.param or "", facts.param)
    return found


def _call(item_id: str, call: WholeCall, status: ItemStatus) -> ToldItem:
    return {
        "id": item_id,
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def _logprobs(kind: TextKind, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {"logprobs": list(logprobs)} if kind.logprobs else {}


def _usage(usage: Usage, thought_tokens: int) -> ResponseUsage:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.reused_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.answer_tokens,
        "output_tokens_details": {"reasoning_tokens": thought_tokens},
        "total_tokens": usage.prompt_tokens + usage.answer_tokens,
    }
