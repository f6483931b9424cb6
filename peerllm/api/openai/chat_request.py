"""The body of POST /v1/chat/completions: what is understood, what is refused, what is skipped.

Fields that change the answer and are not supported are refused rather than ignored; fields nobody knows are skipped,
since clients send many.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peerllm.api.error_answers import FieldError
from peerllm.api.fields import Fields
from peerllm.types import SAMPLING_LIMITS, Sampling

MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of one message's content
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_NAME_CHARS = 512  # of a model, a user
MAX_TOKENS = 2**31 - 1
ROLES = ("system", "developer", "user", "assistant", "tool")
_SEED_BITS = 63
_UNSUPPORTED = (
    "logprobs", "top_logprobs", "logit_bias", "tools", "functions", "audio", "prediction", "web_search_options",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked body. `sampling` holds only what the client said; the model's defaults fill the rest."""

    model: str
    messages: tuple[Mapping[str, str], ...]
    stream: bool
    include_usage: bool
    max_tokens: int | None
    stops: tuple[str, ...]
    sampling: Mapping[str, float]
    return_token_ids: bool
    user: str

    def sampling_with(self, defaults: Mapping[str, float]) -> Sampling:
        """What the client said, else `defaults` (ModelText.defaults); a random seed if none was given."""
        chosen: dict[str, Any] = {"seed": secrets.randbits(_SEED_BITS), **defaults, **self.sampling}
        return Sampling(**chosen)


def parse_chat(fields: Fields) -> ChatRequest:
    """The request in a body; FieldError names what is wrong with it."""
    _refuse_unsupported(fields)
    options = fields.inner("stream_options")
    limit = fields.integer("max_completion_tokens", 1, MAX_TOKENS)
    return ChatRequest(
        model=fields.text("model", MAX_NAME_CHARS),
        messages=_messages(fields),
        stream=fields.flag("stream"),
        include_usage=options.flag("include_usage"),
        max_tokens=limit or fields.integer("max_tokens", 1, MAX_TOKENS),
        stops=_stops(fields),
        sampling=_sampling(fields),
        return_token_ids=fields.flag("return_token_ids"),
        user=fields.text("user", MAX_NAME_CHARS, default=""),
    )


def _refuse_unsupported(fields: Fields) -> None:
    for name in _UNSUPPORTED:
        if fields.raw(name):
            raise FieldError(f"{name} is not supported", name, "unsupported_parameter")
    if fields.integer("n", 1, 1024) not in (None, 1):
        raise FieldError("n: only one answer per request is supported", "n", "unsupported_parameter")
    form = fields.inner("response_format")
    if form.raw("type") not in (None, "text"):
        raise FieldError("response_format: only text is supported", "response_format", "unsupported_parameter")
    modalities = fields.raw("modalities")
    if modalities not in (None, ["text"]):
        raise FieldError("modalities: only text is supported", "modalities", "unsupported_parameter")


def _sampling(fields: Fields) -> dict[str, float]:
    said: dict[str, float] = {}
    for name, low, high in SAMPLING_LIMITS:
        value: float | None
        if name == "seed":
            value = fields.integer(name, -(2**_SEED_BITS), 2**_SEED_BITS - 1)
            value = None if value is None else value % 2**_SEED_BITS
        elif name == "top_k":
            value = fields.integer(name, int(low), int(high))
        else:
            value = fields.number(name, low, high)
        if value is not None:
            said[name] = value
    return said


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.raw("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not good or not all(isinstance(one, str) and 1 <= len(one) <= MAX_STOP_CHARS for one in stops):
        raise fields.wrong("stop", f"a string or a list of up to {MAX_STOPS}, each of 1 to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _messages(fields: Fields) -> tuple[Mapping[str, str], ...]:
    value = fields.raw("messages")
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise fields.wrong("messages", f"a list of 1 to {MAX_MESSAGES} messages")
    return tuple(_message(one, f"messages[{index}]") for index, one in enumerate(value))


def _message(value: object, where: str) -> Mapping[str, str]:
    if not isinstance(value, dict):
        raise FieldError(f"{where} must be an object", where)
    fields = Fields(value, f"{where}.")
    if value.get("role") not in ROLES:
        raise fields.wrong("role", "one of " + ", ".join(ROLES))
    if value.get("tool_calls") or value.get("function_call"):
        raise FieldError(f"{where}.tool_calls is not supported", f"{where}.tool_calls", "unsupported_parameter")
    role = "system" if value["role"] == "developer" else value["role"]
    return {"role": role, "content": _content(fields, role)}


def _content(fields: Fields, role: str) -> str:
    value = fields.raw("content")
    if isinstance(value, str):
        return value
    if value is None and role == "assistant":
        return ""
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PARTS:
        raise fields.wrong("content", "a string or a list of text parts")
    return "".join(_part(part, f"{fields.where}content[{index}]") for index, part in enumerate(value))


def _part(value: object, where: str) -> str:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise FieldError(f"{where} must be an object with a type", where)
    if value["type"] != "text":
        kind = value["type"][:40]
        what = f"{where}: parts of type {kind!r} cannot be read: models read text only here, send text parts"
        raise FieldError(what, where, "unsupported_content")
    if not isinstance(value.get("text"), str):
        raise FieldError(f"{where}.text must be a string", f"{where}.text")
    return str(value["text"])
