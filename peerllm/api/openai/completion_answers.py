"""Answers of /v1/completions: text."""

from __future__ import annotations

from collections.abc import Sequence

from peerllm.api.core.telling import WholeAnswer
from peerllm.api.openai.completion_requests import CompletionBody
from peerllm.api.openai.openai_answers import OpenAIAnswers
from peerllm.api.openai.openai_objects import TextLogprobs, TextPart
from peerllm.api.text.calls.answer_parts import ToldToken


class CompletionAnswers(OpenAIAnswers):
    prefix, whole_kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, body: CompletionBody) -> None:
        super().__init__(body.n or 1, bool(body.return_token_ids), body.with_usage)
        self._echoed = [str(one) for one in body.prompts()] if body.echo else None

    def choice(self, answer: WholeAnswer, index: int) -> TextPart:
        return {"text": self._echo(index) + answer.text}

    def opening(self, index: int) -> TextPart | None:
        """The prompt, where it is wanted back."""
        return {"text": self._echo(index)} if self._echoed is not None else None

    def delta(self, text: str, thought: bool = False) -> TextPart:
        return {"text": text}

    def logprobs(self, tokens: Sequence[ToldToken]) -> TextLogprobs:
        return {
            "tokens": [_name(one.data) for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [_by_name([*one.likeliest, (one.data, one.logprob)]) for one in tokens],
            "text_offset": [one.offset for one in tokens],
        }

    def _echo(self, index: int) -> str:
        return self._echoed[index // self._per_prompt] if self._echoed is not None else ""


def _name(data: bytes) -> str:
    """A token as text; one that is a piece of a character as OpenAI writes it here."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{one:02x}" for one in data)


def _by_name(entries: Sequence[tuple[bytes, float]]) -> dict[str, float]:
    """Of tokens that look the same the likeliest."""
    found = dict[str, float]()
    for data, logprob in entries:
        found.setdefault(_name(data), logprob)
    return found
