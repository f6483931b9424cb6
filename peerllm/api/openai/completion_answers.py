"""Answers of /v1/completions: text."""

from __future__ import annotations

from peerllm.api.core.telling import WholeAnswer
from peerllm.api.openai.completion_requests import CompletionBody
from peerllm.api.openai.openai_answers import OpenAIAnswers
from peerllm.api.openai.openai_objects import TextPart


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

    def _echo(self, index: int) -> str:
        return self._echoed[index // self._per_prompt] if self._echoed is not None else ""
