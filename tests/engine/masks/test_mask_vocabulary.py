"""A tokenizer read for masks alone is the whole one: the same bytes of each token, the same masks."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

from peerllm.builtin import MODEL_DIR
from peerllm.engine.masks import mask_vocabulary
from peerllm.engine.masks.mask_vocabulary import mask_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12}, "temperature": {"type": "number"},
        "unit": {"enum": ["celsius", "fahrenheit"]}, "explanation_steps": {"type": "boolean"},
    },
    "required": ["name", "temperature", "unit", "explanation_steps"], "additionalProperties": False,
}  # fmt: skip
WORDS = [
    "the",
    "kettle",
    "sings",
    "name",
    "temperature",
    "unit",
    "celsius",
    "fahrenheit",
    "explanation",
    "steps",
    "true",
]
SIGNS = ['{"', '":', ' "', '",', "},", " [{"]  # no piece of a word has a space within


def sentencepiece() -> bytes:
    """A tokenizer in SentencePiece's manner, with bytes for what it does not know; "a" and "<0x61>" are the same."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", mask_vocabulary.SPACE)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [chr(one) for one in range(32, 127)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=letters, show_progress=False)
    made.train_from_iterator([*SIGNS, *WORDS, *(f" {one}" for one in WORDS)] * 9, trainer)
    about = json.loads(made.to_str())
    about["added_tokens"] = [one for one in about["added_tokens"] if not one["content"].startswith("<0x")]
    made = Tokenizer.from_str(json.dumps(about))
    made.add_special_tokens([AddedToken("<end>", special=True)])
    made.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("[THINK]", special=False)])
    return made.to_str().encode()


TEXTS = ['{"name": "', '", "temperature": ', '{"explanation_steps": [{"unit": "', "the kettle sings", "grüße 🏡"]
KINDS = [(MODEL_DIR / "tokenizer.json").read_bytes(), sentencepiece()]


@pytest.mark.parametrize("data", KINDS, ids=["byte level", "sentencepiece"])
def test_it_is_the_whole_one(data: bytes) -> None:
    whole = LLTokenizer(data.decode(), eos_token=[3])
    assert mask_vocabulary._vocabulary(data, 3) is not None, "it is read in the small way"
    small = mask_tokenizer(data, [3])
    assert (small.vocab_size, small.eos_token) == (whole.vocab_size, 3)
    for one in range(whole.vocab_size):
        assert small.decode_bytes([one]) == whole.decode_bytes([one])
        assert small.is_special_token(one) == whole.is_special_token(one)
    for text in TEXTS:
        assert small.decode_bytes(small.tokenize_str(text)) == text.encode()
        if text.isascii():
            assert small.tokenize_str(text) == whole.tokenize_str(text), text


@pytest.mark.parametrize("data", KINDS, ids=["byte level", "sentencepiece"])
@pytest.mark.parametrize("seed", range(3))
def test_masks_are_the_same(data: bytes, seed: int) -> None:
    form = LLMatcher.grammar_from_json_schema(SCHEMA)
    one, other = (LLMatcher(it, form) for it in (LLTokenizer(data.decode(), eos_token=[3]), mask_tokenizer(data, [3])))
    chance, steps = Random(seed), 0
    while not one.is_stopped():
        mask = one.compute_bitmask()
        assert other.compute_bitmask() == mask, steps
        allowed = [token for token in range(8 * len(mask)) if mask[token // 8] >> token % 8 & 1]
        token = chance.choice(allowed)
        assert one.consume_token(token) and other.consume_token(token)
        steps += 1
    assert other.is_stopped() and steps > 10


@pytest.mark.parametrize("model", [{"type": "Unigram", "vocab": [["a", -1.0]]}, {"type": "WordPiece", "vocab": {}}, 5])
def test_other_kinds_are_left_to_the_library(model: Any) -> None:
    assert mask_vocabulary._vocabulary(json.dumps({"model": model}).encode(), 0) is None


def test_what_is_no_tokenizer() -> None:
    with pytest.raises(Exception, match="EOF"):
        mask_tokenizer(b"{", [1])


@pytest.mark.parametrize(("number", "end"), [(mask_vocabulary.MAX_IDS, 3), (9, mask_vocabulary.MAX_IDS), (9, -1)])
def test_ids_without_bounds(number: int, end: int) -> None:
    """A list up to such an id would take the memory of the whole machine."""
    about = json.loads(KINDS[0])
    about["added_tokens"].append({**about["added_tokens"][0], "id": number, "content": "<odd>"})
    known = Tokenizer.from_str(json.dumps(about)).token_to_id("<odd>")
    assert known == len(Tokenizer.from_buffer(KINDS[0]).get_vocab()), "the library does not go by it"
    with pytest.raises(ValueError, match="a token has an id"):
        mask_tokenizer(json.dumps(about).encode(), [end])
