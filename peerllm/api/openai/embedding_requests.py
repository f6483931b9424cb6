"""The body of POST /v1/embeddings, and what is answered to it."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from peerllm.api.core.embeddings import MAX_INPUTS, Vectors, as_base64, as_json, unit
from peerllm.api.core.generation import MAX_NAME_CHARS, Generation, Name
from peerllm.api.error_answers import FieldError
from peerllm.api.openai.openai_fields import TextsOrIds, texts_or_ids
from peerllm.api.openai.openai_objects import OpenAIVectors


class EmbeddingBody(Struct, kw_only=True):
    model: Name
    input: TextsOrIds
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    user: Annotated[str, Meta(max_length=MAX_NAME_CHARS)] | None = None

    def generations(self) -> list[Generation]:
        inputs = texts_or_ids(self.input, "input")
        if len(inputs) > MAX_INPUTS:
            raise FieldError(f"input: at most {MAX_INPUTS} texts", "input")
        return [Generation(model=self.model, prompt=one, embeds=True, user=self.user or "") for one in inputs]

    def answer(self, made: Vectors) -> OpenAIVectors:
        """OpenAI's list of vectors of length 1."""
        vectors = [unit(vector, self.dimensions) for vector in made.vectors]
        coded: list[list[float] | str] = [
            as_base64(one) if self.encoding_format == "base64" else as_json(one) for one in vectors
        ]
        return {
            "object": "list",
            "data": [{"object": "embedding", "index": place, "embedding": one} for place, one in enumerate(coded)],
            "model": made.model,
            "usage": {"prompt_tokens": made.tokens, "total_tokens": made.tokens},
        }
