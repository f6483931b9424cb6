"""Log probabilities of tokens as OpenAI's chats and Ollama tell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from peerllm.api.text.calls.answer_parts import ToldToken


class LikelyToken(TypedDict):
    """One that is a piece of a character is written as OpenAI does it: \\xf0\\x9f."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(LikelyToken):
    """A token of the text, and those that were likeliest in its place."""

    top_logprobs: list[LikelyToken]


def logprob_objects(tokens: Sequence[ToldToken]) -> list[TokenLogprob]:
    return [
        {**_likely(one.data, one.logprob), "top_logprobs": [_likely(*other) for other in one.likeliest]}
        for one in tokens
    ]


def _likely(data: bytes, logprob: float) -> LikelyToken:
    return {"token": data.decode(errors="backslashreplace"), "logprob": logprob, "bytes": list(data)}
