"""What happens while an answer is written, in the form that all APIs share; one device tells another in it too."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct

from peerllm.api.text.calls.answer_parts import ToldToken


class Usage(Struct, frozen=True, omit_defaults=True):
    """Tokens: of the prompt, of the answer, and of the prompt those that were computed for an earlier one."""

    prompt_tokens: int
    answer_tokens: int
    reused_tokens: int = 0


class Timings(Struct, frozen=True, omit_defaults=True):
    """Seconds on the device that answers: from the encoded prompt to the first token, and from there to the end."""

    prompt_s: float = 0.0
    answer_s: float = 0.0


class AnswerWaits(Struct, frozen=True, tag="waits"):
    """A sign of life: what is being done meanwhile, for a person to read."""

    note: str


class AnswerBegins(Struct, frozen=True, tag="begins"):
    """The first token is there. All that is told of one answer has its id and its time (Unix seconds).

    `temperature` and `top_p` are those that it is drawn with.
    """

    id: str
    created: int
    model: str
    prompt_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


class TextDelta(Struct, frozen=True, omit_defaults=True, tag="text"):
    """More text, the ids of the tokens that it completes, and how many tokens the answer has with them.

    `thought`: it is what the model thinks before it answers. `logprobs`: where they were asked for, of the tokens of
    what is said, each once, with the first of its characters.
    """

    text: str
    ids: tuple[int, ...]
    tokens: int
    thought: bool = False
    logprobs: tuple[ToldToken, ...] = ()


class ToolCallBegins(Struct, frozen=True, omit_defaults=True, tag="call"):
    """The model calls a tool; calls are counted from 0. `ids` and `tokens` as in TextDelta."""

    index: int
    id: str
    name: str
    ids: tuple[int, ...]
    tokens: int


class ToolCallDelta(Struct, frozen=True, omit_defaults=True, tag="arguments"):
    """More of the arguments of the call that began last: a piece of a JSON object's text."""

    index: int
    arguments: str
    ids: tuple[int, ...]
    tokens: int


class AnswerEnds(Struct, frozen=True, omit_defaults=True, tag="ends"):
    """The answer is complete. `ids` had no text; `stop` is the stop string that ended it; it has so many `calls`.

    "load" and "unload" end one to which nothing was to be said. `all_ids` as Generation.tells_ids has it.
    """

    reason: Literal["stop", "length", "load", "unload"]
    usage: Usage
    ids: tuple[int, ...] = ()
    stop: str = ""
    timings: Timings = Timings()
    calls: int = 0
    all_ids: tuple[int, ...] = ()


class Embedded(Struct, frozen=True, tag="embedded"):
    """What was asked for in place of an answer: 32-bit numbers, the least significant byte first."""

    vector: bytes
    model: str


class AnswerFails(Struct, frozen=True, tag="fails"):
    """It breaks off: an error as `household_error` has it. Only between devices; here the error is raised."""

    error: dict[str, Any]


AnswerEvent = AnswerWaits | AnswerBegins | TextDelta | ToolCallBegins | ToolCallDelta | AnswerEnds | Embedded
TOLD: msgspec.json.Decoder[AnswerEvent | AnswerFails] = msgspec.json.Decoder(AnswerEvent | AnswerFails)
