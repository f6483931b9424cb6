"""The bodies of /api/embed and of its older sister /api/embeddings, and what is answered to them."""

from __future__ import annotations

import time
from typing import Annotated

from msgspec import Meta, Struct

from peerllm.api.core.embeddings import MAX_INPUTS, Vectors, as_json, unit
from peerllm.api.core.generation import Generation, Name
from peerllm.api.ollama.keep_alive import KeepAlive, seconds_of
from peerllm.api.ollama.ollama_answers import NS
from peerllm.api.ollama.ollama_objects import OllamaVector, OllamaVectors
from peerllm.api.ollama.ollama_requests import OllamaOptions


class EmbedFields(Struct, kw_only=True):
    model: Name
    options: OllamaOptions | None = None
    keep_alive: KeepAlive = None
    truncate: bool | None = None

    def of(self, text: str) -> Generation:
        """What is asked for one text."""
        return Generation(
            model=self.model, prompt=text, embeds=True, truncates=self.truncate is not False, keep_alive_s=self._kept_s
        )

    def loading(self) -> Generation:
        """What is asked where nothing is said."""
        return Generation(model=self.model, keep_alive_s=self._kept_s, load_only=True)

    @property
    def _kept_s(self) -> float | None:
        options = self.options or OllamaOptions()
        return seconds_of(options.keep_alive if self.keep_alive is None else self.keep_alive)


class EmbedBody(EmbedFields, kw_only=True):
    input: str | Annotated[list[str], Meta(max_length=MAX_INPUTS)] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None

    def generations(self) -> list[Generation]:
        """One for each text; empty where nothing is said: the model is only to be loaded."""
        given = [self.input] if isinstance(self.input, str) else self.input or []
        return [self.of(one) for one in given if one or isinstance(self.input, list)]

    def answer(self, made: Vectors | None, since: float) -> OllamaVectors:
        """Vectors of length 1."""
        vectors = [as_json(unit(vector, self.dimensions)) for vector in made.vectors] if made is not None else []
        took = int((time.monotonic() - since) * NS)
        told = OllamaVectors(model=self.model, embeddings=vectors, total_duration=took, load_duration=0)
        if made is not None:
            told["prompt_eval_count"] = made.tokens
        return told


class OlderEmbedBody(EmbedFields, kw_only=True):
    prompt: str | None = None

    def generations(self) -> list[Generation]:
        """Empty where nothing is said: the model is only to be loaded."""
        return [self.of(self.prompt)] if self.prompt else []

    def answer(self, made: Vectors | None) -> OllamaVector:
        """One vector, as long as it is."""
        return {"embedding": made.vectors[0].tolist() if made is not None else []}
