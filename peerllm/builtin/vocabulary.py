"""Trains the byte-level BPE tokenizer and writes it in the Hugging Face layout."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from peerllm.builtin.chat_format import BEGIN, END, PAD, SPECIALS, TEMPLATE, render
from peerllm.builtin.exchanges.dialogues import dialogues

VOCABULARY = 2048  # tokens
SAMPLE = 20_000  # dialogues that the merges are counted on


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE tokenizer; each digit is a token of its own, so that sums can be learned."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (_plain(render(dialogue)) for dialogue in islice(dialogues(seed), SAMPLE))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _plain(text: str) -> str:
    for special in SPECIALS:
        text = text.replace(special, "\n")
    return text


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context_tokens: int) -> None:
    """Writes tokenizer.json, its configuration and the chat template into the folder."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": context_tokens,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
