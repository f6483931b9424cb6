"""Fields that OpenAI's requests share. Those that nobody knows are skipped, since clients send many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta, Struct

from peerllm.api.core.generation import (
    MAX_NAME_CHARS,
    MAX_STOPS,
    AnySeed,
    FrequencyPenalty,
    Generation,
    MinP,
    Name,
    PresencePenalty,
    RepetitionPenalty,
    SamplingOptions,
    StopString,
    Temperature,
    TokenCount,
    TopK,
    TopP,
    seed_of,
)
from peerllm.api.core.several_answers import MAX_ANSWERS
from peerllm.api.error_answers import FieldError

Stops = StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None
Answers = Annotated[int, Meta(ge=1, le=MAX_ANSWERS)]
TextsOrIds = str | Annotated[list[str | Annotated[list[int], Meta(min_length=1)] | int], Meta(min_length=1)]
Flag = bool | None
# What is refused with a clear line, unless it is empty.
NoObject = Annotated[dict[str, Any], Meta(extra_json_schema={"maxProperties": 0})]
NoList = Annotated[list[Any], Meta(extra_json_schema={"maxItems": 0})]
# What OpenAI calls a Generation's fields.
NAMES: Mapping[str, str] = {"answer_form": "response_format", "parallel_calls": "parallel_tool_calls"}


class StreamOptions(Struct):
    include_usage: Flag = None


class SampledFields(Struct, kw_only=True):
    """`top_k`, `min_p` and `repetition_penalty` are not OpenAI's; other servers have them too."""

    model: Name
    stream: Flag = None
    stop: Stops = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: PresencePenalty | None = None
    frequency_penalty: FrequencyPenalty | None = None
    seed: AnySeed | None = None
    logit_bias: NoObject | None = None
    user: Annotated[str, Meta(max_length=MAX_NAME_CHARS)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self) -> SamplingOptions:
        """FieldError for what would change the answer and cannot be done."""
        if self.logit_bias:
            raise FieldError("logit_bias is not supported", "logit_bias", "unsupported_parameter")
        return SamplingOptions(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed_of(self.seed),
        )


class OpenAIFields(SampledFields, kw_only=True):
    """`return_token_ids` is not OpenAI's."""

    stream_options: StreamOptions | None = None
    max_tokens: TokenCount | None = None
    n: Answers | None = None
    return_token_ids: Flag = None

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def texts_or_ids(given: TextsOrIds, name: str) -> list[str | tuple[int, ...]]:
    """The texts, or their token ids, in a field of that name: a text, ids, or a list of either."""
    if isinstance(given, str):
        return [given]
    ids = [one for one in given if isinstance(one, int)]
    if not ids:
        return [tuple(one) if isinstance(one, list) else str(one) for one in given]
    if len(ids) < len(given):
        raise FieldError(f"{name} must be a text, token ids, or a list of either", name)
    return [tuple(ids)]


def copies(wanted: Generation, count: int) -> list[Generation]:
    """As many answers to it."""
    return [wanted, *(wanted.another(number) for number in range(1, count))]
