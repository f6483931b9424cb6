"""The shipped model's answers, computed by plain transformers and not by peerllm's engine, to measure the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peerllm.builtin import MODEL_DIR

BATCH = 50  # prompts computed together
ANSWER_TOKENS = 80  # the longest sum needs 60

Messages = list[dict[str, str]]


def one(said: str) -> Messages:
    """A conversation of one user message."""
    return [{"role": "user", "content": said}]


class Answerer:
    """The shipped files, computed in float32 with greedy choice."""

    def __init__(self, folder: Path = MODEL_DIR) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._model.eval()  # type: ignore[no-untyped-call]
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")

    def answers(self, prompts: Sequence[Messages], limit_tokens: int = ANSWER_TOKENS) -> list[str]:
        """The model's answer to each conversation, without special tokens."""
        found: list[str] = []
        for at in range(0, len(prompts), BATCH):
            texts = [
                self._tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
                for prompt in prompts[at : at + BATCH]
            ]
            inputs = self._tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            inputs.pop("token_type_ids", None)
            with torch.inference_mode():
                out = self._model.generate(**inputs, max_new_tokens=limit_tokens, do_sample=False)
            width = inputs["input_ids"].shape[1]
            found += self._tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        return found
