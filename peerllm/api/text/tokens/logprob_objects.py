"""Log probabilities of tokens as OpenAI's chats and Ollama tell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peerllm.api.text.calls.answer_parts import ToldToken


def logprob_objects(tokens: Sequence[ToldToken]) -> list[dict[str, Any]]:
    """One for each token, with those that were likeliest in its place."""
    return [
        {**_entry(one.data, one.logprob), "top_logprobs": [_entry(*other) for other in one.likeliest]} for one in tokens
    ]


def _entry(data: bytes, logprob: float) -> dict[str, Any]:
    """A token that is a piece of a character is written as OpenAI does it: \\xf0\\x9f."""
    return {"token": data.decode(errors="backslashreplace"), "logprob": logprob, "bytes": list(data)}
