"""Tokenizers of real GGUF files: the ids of transformers where it builds them rightly, else of llama.cpp, recorded."""

from __future__ import annotations

import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from peerllm.api.text.detokenizer import Detokenizer, special_ids
from peerllm.api.text.model_text import ModelText
from peerllm.daemon.weights.gguf.header import read_gguf
from peerllm.daemon.weights.gguf.tokenizer_files import tokenizer_files
from tests.api.fake import as_told
from tests.lab.real_gguf import FILES, real_gguf

pytestmark = [pytest.mark.lab, pytest.mark.timeout(600)]
SMOLLM2, GEMMA = "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"
CONVERSATION = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": " And\tof Österreich?\n"},
]
WORDS = [
    "The", "house", " ", "  ", "\n", "\n\n\n", "\t", "it's", "WE'LL", ".", "?!", "=====", "größer", "où", "é", "家里",
    "わたし", "дом", "🏡", "👨\u200d👩\u200d👧", "नमस्ते", "e\u0301", "\u00a0", "<b>", "<end_of_turn>", "<|im_end|>",
    "def f(x):\n    return x",
]  # fmt: skip
RECORDED = {  # what llama.cpp makes of digits, which transformers does not split in SmolLM2's file
    SMOLLM2: ("In 2026    1 a  33!", [788, 216, 34, 32, 34, 38, 289, 33, 253, 256, 35, 35, 17]),
    GEMMA: (
        "In 2026    1 a  33!",
        [2, 902, 236743, 236778, 236771, 236778, 236825, 140, 236770, 496, 138, 236800, 236800, 236888],
    ),
}


@cache
def both(name: str) -> tuple[ModelText, Any]:
    """Ours and transformers'."""
    from transformers import AutoTokenizer

    file = real_gguf(name)
    with tempfile.TemporaryDirectory() as directory:
        for made, content in tokenizer_files(read_gguf(file).metadata).items():
            (Path(directory) / made).write_bytes(content)
        ours = ModelText(Path(directory))
    return ours, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def texts(count: int) -> list[str]:
    rng = random.Random(7)
    return ["".join(rng.choices(WORDS, k=rng.randint(1, 30))) for _ in range(count)]


@pytest.mark.parametrize("name", FILES)
def test_ids_are_those_of_transformers_and_llama_cpp(name: str) -> None:
    ours, theirs = both(name)
    for text in texts(500):
        assert ours._tokenizer.encode(text, add_special_tokens=False).ids == theirs.encode(
            text, add_special_tokens=False
        ), text
    text, ids = RECORDED[name]
    assert ours._tokenizer.encode(text).ids == ids


def test_a_conversation_is_rendered_as_transformers_does() -> None:
    ours, theirs = both(SMOLLM2)
    rendered = theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    assert ours.prompt(CONVERSATION, 4096) == theirs.encode(rendered, add_special_tokens=False)
    assert rendered.endswith("<|im_start|>assistant\n")


def test_answers_come_back_as_text() -> None:
    """Piece by piece, as they are streamed."""
    for name in FILES:
        ours, _ = both(name)
        decoder = as_told(ours._tokenizer)
        for text in texts(100):
            plain = text.replace("<|im_end|>", "").replace("<end_of_turn>", "")
            detokenizer = Detokenizer(decoder, special_ids(decoder))
            ids = ours._tokenizer.encode(plain, add_special_tokens=False).ids
            assert "".join(detokenizer.push([one]) for one in ids) + detokenizer.flush() == plain
