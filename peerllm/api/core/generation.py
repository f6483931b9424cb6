"""One request in the form that all APIs share; a device hands it to another in this form too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from peerllm.api.error_answers import FieldError
from peerllm.logprobs import MAX_LIKELIEST
from peerllm.types import SAMPLING_LIMITS

MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_NAME_CHARS = 512  # of a model, a user
MAX_TOKENS = 2**31 - 1
MAX_TOOLS = 512
MAX_TOOL_NAME_CHARS = 256
MAX_FORM_BYTES = 64 << 10  # of a schema or grammar
MAX_KEPT_TOOLS_BYTES = 256 << 10  # of tools whose calls masks keep
MAX_KEEP_S = 100 * 365 * 24 * 3600.0  # seconds a model is kept loaded: later times cannot be told
SEED_BITS = 63
_LIMITS = {name: Meta(ge=low, le=high) for name, low, high in SAMPLING_LIMITS}

Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
ToolName = Annotated[str, Meta(min_length=1, max_length=MAX_TOOL_NAME_CHARS)]
TokenCount = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_LIKELIEST)]
AnySeed = Annotated[int, Meta(ge=-(2**SEED_BITS), le=2**SEED_BITS - 1)]  # as clients count; `seed_of` makes it ours
Temperature = Annotated[float, _LIMITS["temperature"]]
TopP = Annotated[float, _LIMITS["top_p"]]
TopK = Annotated[int, _LIMITS["top_k"]]
MinP = Annotated[float, _LIMITS["min_p"]]
RepetitionPenalty = Annotated[float, _LIMITS["repetition_penalty"]]
PresencePenalty = Annotated[float, _LIMITS["presence_penalty"]]
FrequencyPenalty = Annotated[float, _LIMITS["frequency_penalty"]]
Seed = Annotated[int, _LIMITS["seed"]]


class SamplingOptions(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a client said of types.Sampling; the model's defaults fill the rest, and a random seed."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: PresencePenalty | None = None
    frequency_penalty: FrequencyPenalty | None = None
    seed: Seed | None = None

    def said(self) -> dict[str, Any]:
        """The options that were given."""
        return {name: value for name in self.__struct_fields__ if (value := getattr(self, name)) is not None}


class CalledTool(Struct, frozen=True, omit_defaults=True):
    """A call that the model made in an earlier answer."""

    id: str
    name: str
    arguments: Mapping[str, Any]


class ChatMessage(Struct, frozen=True, omit_defaults=True):
    """What the chat template sees of one message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: tuple[CalledTool, ...] = ()  # of the assistant
    tool_call_id: str = ""  # of a tool: which call it answers
    name: str = ""  # of a tool


class OfferedTool(Struct, frozen=True, omit_defaults=True):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: ToolName
    description: str = ""
    parameters: Mapping[str, Any] = {}
    strict: bool = False


class CallsWanted(Struct, frozen=True, omit_defaults=True):
    """The calls that an answer may have: of these tools, and only one where they are not `parallel`.

    `keep`: masks see to it that what begins as a call is one, or that the answer has nothing else ("needed").
    """

    tools: tuple[OfferedTool, ...] = ()
    parallel: bool = True
    keep: Literal["", "begun", "needed"] = ""


class AnswerForm(Struct, frozen=True, omit_defaults=True):
    """What the answer's text must be: any JSON object, JSON that fits `schema`, or what `grammar` says.

    In Lark, `%json {...}` is JSON that fits.
    """

    kind: Literal["json", "schema", "regex", "lark"]
    schema: Mapping[str, Any] = {}
    grammar: str = ""  # a regular expression, or a grammar in llguidance's Lark


class Generation(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One answer that is asked for: to `messages`, or, where there are none, the continuation of `prompt`.

    An answer depends on nothing else, so equal ones under one key are one answer.
    """

    model: Name
    messages: Annotated[tuple[ChatMessage, ...], Meta(max_length=MAX_MESSAGES)] = ()
    prompt: str | tuple[int, ...] = ""  # a text, or token ids
    suffix: str = ""  # the prompt is text, and the answer stands between it and this
    after: tuple[int, ...] = ()  # ids of earlier messages and the answer to them, which this follows
    tells_ids: bool = False  # the end of the answer tells all ids, for what comes `after` it
    max_tokens: TokenCount | None = None  # None: as many as the context has room for
    stops: Annotated[tuple[StopString, ...], Meta(max_length=MAX_STOPS)] = ()
    sampling: SamplingOptions = SamplingOptions()
    tools: Annotated[tuple[OfferedTool, ...], Meta(max_length=MAX_TOOLS)] = ()
    tool_choice: str = ""  # "auto", "none", "required" or a tool's name
    parallel_calls: bool = True
    answer_form: AnswerForm | None = None
    reasoning: bool | str | None = None  # whether, or how much, to reason first; None: as the model likes
    logprobs: TopLogprobs | None = None  # of each token of what is said, and of so many that were likeliest there
    keep_alive_s: Annotated[float, Meta(le=MAX_KEEP_S)] | None = (
        None  # how long the model stays loaded after it; below 0: for good
    )
    embeds: bool = False  # not an answer is wanted but the vector of `prompt`
    counts: bool = False  # only the prompt's tokens are to be counted
    truncates: bool = False  # of a prompt that is longer than the context the beginning will do
    load_only: bool = False  # nothing is asked: the model is to be loaded, or, kept for 0 s, unloaded
    user: Annotated[str, Meta(max_length=MAX_NAME_CHARS)] = ""

    def calls(self) -> CallsWanted:
        """What the model is told of tools: of all, of none, or of the one that is chosen, which it calls once."""
        if self.tool_choice == "none" or not self.tools:
            return CallsWanted()
        chosen = tuple(tool for tool in self.tools if tool.name == self.tool_choice)
        if chosen or self.tool_choice == "required":
            return CallsWanted(chosen or self.tools, self.parallel_calls and not chosen, "needed")
        kept = self.answer_form is not None or any(tool.strict for tool in self.tools)
        return CallsWanted(self.tools, self.parallel_calls, "begun" if kept else "")

    def another(self, number: int) -> Generation:
        """The same with another seed, if it has one: further answers to one request are the same every time."""
        seed = self.sampling.seed
        if seed is None:
            return self
        return replace(self, sampling=replace(self.sampling, seed=seed_of(seed + number)))


def checked(wanted: Generation, names: Mapping[str, str]) -> Generation:
    """`wanted`; FieldError if it asks for what cannot be done, under the name that its API has for it (`names`)."""
    offered = [tool.name for tool in wanted.tools]
    if len(set(offered)) < len(offered):
        raise FieldError("tools: two have the same name", "tools")
    if wanted.tool_choice not in ("", "auto", "none", *(("required",) if offered else ()), *offered):
        what = f"there is no tool {wanted.tool_choice[:80]!r} among the tools"
        raise FieldError(f"tool_choice: {what if offered else 'there are no tools to call'}", "tool_choice")
    calls = wanted.calls()
    if calls.keep and len(msgspec.json.encode(calls.tools)) > MAX_KEPT_TOOLS_BYTES:
        what = f"tools whose calls are enforced are larger than {MAX_KEPT_TOOLS_BYTES >> 10} KiB: offer fewer of them"
        raise FieldError(what, "tools")
    form = wanted.answer_form
    if form is not None and len(msgspec.json.encode(form)) > MAX_FORM_BYTES:
        name = names.get("answer_form", "answer_form")
        raise FieldError(f"{name} is larger than {MAX_FORM_BYTES >> 10} KiB", name)
    return wanted


def seed_of(given: int | None) -> int | None:
    """A seed within its bounds, whichever way the client counts."""
    return None if given is None else given % 2**SEED_BITS
