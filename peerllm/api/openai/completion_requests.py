"""The body of POST /v1/completions, and what is asked by it: the continuation of texts as they stand."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from peerllm.api.core.generation import Generation, checked
from peerllm.api.core.several_answers import MAX_ANSWERS
from peerllm.api.error_answers import FieldError
from peerllm.api.openai.openai_fields import NAMES, Answers, Flag, OpenAIFields, TextsOrIds, copies, texts_or_ids

DEFAULT_TOKENS = 16  # of an answer, as OpenAI has it


class CompletionBody(OpenAIFields, kw_only=True):
    prompt: TextsOrIds
    echo: Flag = None
    suffix: str | None = None
    best_of: Answers | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None

    def prompts(self) -> list[str | tuple[int, ...]]:
        return texts_or_ids(self.prompt, "prompt")

    def generations(self) -> list[Generation]:
        """`n` for each prompt, in its order."""
        prompts, count = self.prompts(), self.n or 1
        if self.best_of is not None and self.best_of != count:
            raise FieldError("best_of is not supported", "best_of", "unsupported_parameter")
        if len(prompts) * count > MAX_ANSWERS:
            raise FieldError(f"prompt: at most {MAX_ANSWERS} answers are given to one request", "prompt")
        if self.echo and not all(isinstance(one, str) for one in prompts):
            raise FieldError("echo is supported for text only, not for token ids", "echo", "unsupported_parameter")
        if self.suffix and not all(isinstance(one, str) for one in prompts):
            raise FieldError("suffix is supported for text only, not for token ids", "suffix", "unsupported_parameter")
        if self.echo and self.logprobs is not None:
            what = "echo: log probabilities are told of answers only, not of prompts; ask for one of the two"
            raise FieldError(what, "echo", "unsupported_parameter")
        found = []
        for prompt in prompts:
            wanted = Generation(
                model=self.model,
                prompt=prompt,
                suffix=self.suffix or "",
                max_tokens=self.max_tokens or DEFAULT_TOKENS,
                stops=self.stops,
                sampling=self.sampling(),
                logprobs=self.logprobs,
                user=self.user or "",
            )
            found += copies(checked(wanted, NAMES), count)
        return found
