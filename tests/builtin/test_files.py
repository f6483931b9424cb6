"""The shipped files: there, small enough, finely cut, and read alike by both libraries."""

from __future__ import annotations

import json
import subprocess
import sys
from random import Random

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

from peerllm.builtin import MODEL_DIR
from peerllm.builtin.chat_format import ASSISTANT, END, SPECIALS, encode, render
from peerllm.builtin.exchanges.dialogues import dialogue

MOST_BYTES = 15_000_000
FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "recipe.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_there(name: str) -> None:
    assert (MODEL_DIR / name).stat().st_size > 0


def test_weights_fit_the_package() -> None:
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= MOST_BYTES


def test_it_can_be_cut_finely() -> None:
    config = AutoConfig.from_pretrained(MODEL_DIR)
    assert config.model_type == "llama"
    assert config.num_hidden_layers >= 12
    assert config.max_position_embeddings >= 1024


def test_the_embedding_is_stored_once() -> None:
    assert AutoConfig.from_pretrained(MODEL_DIR).tie_word_embeddings
    with safe_open(MODEL_DIR / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 - not a dict


def test_its_place_is_known_without_torch() -> None:
    check = "import sys, peerllm.builtin as b; print(b.MODEL_DIR.name, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["model", "False"]


def test_the_template_writes_what_training_wrote() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    rng = Random(4)
    for _ in range(50):
        talk = dialogue(rng)
        assert tokenizer.apply_chat_template(talk.messages(), tokenize=False) == render(talk)


def test_the_template_opens_the_answer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    asked = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|user|>Hello<|end|><|assistant|>"


def test_both_libraries_give_the_same_ids() -> None:
    plain = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    whole = AutoTokenizer.from_pretrained(MODEL_DIR)
    text = render(dialogue(Random(9))) + " Grüße, 東京 1234 🙂"
    assert plain.encode(text).ids == whole(text)["input_ids"]


def test_any_text_survives() -> None:
    plain = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    text = "Grüße aus 東京: 1234 °C 🙂\n\ttab"
    assert plain.decode(plain.encode(text).ids) == text


def test_special_tokens_have_the_first_ids_and_end_stops() -> None:
    plain = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    assert [plain.token_to_id(token) for token in SPECIALS] == list(range(len(SPECIALS)))
    generation = json.loads((MODEL_DIR / "generation_config.json").read_text())
    assert generation["eos_token_id"] == plain.token_to_id(END)


def test_only_what_the_model_says_is_marked() -> None:
    plain = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    talk = dialogue(Random(11))
    ids, spoken = encode(plain, [render(talk)])[0]
    said = plain.decode([i for i, mine in zip(ids, spoken, strict=True) if mine], skip_special_tokens=True)
    assert said == "".join(answer for _, answer in talk.exchanges)
    assert not any(mine for i, mine in zip(ids, spoken, strict=True) if i == plain.token_to_id(ASSISTANT))


def test_the_recipe_is_complete() -> None:
    record = json.loads((MODEL_DIR / "recipe.json").read_text())
    assert record["recipe"]["seed"] >= 0
    assert record["curve"][-1]["step"] == record["recipe"]["steps"]
    assert record["results"]["held_out_exact_match"] >= 0.9
