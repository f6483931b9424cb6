"""The training loop on a toy size: it learns, writes a whole folder, and goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from peerllm.builtin import MODEL_DIR, train
from peerllm.builtin.packing import HEARD_WEIGHT, Packer
from peerllm.builtin.recipe import Recipe
from peerllm.builtin.train import Trainer


def toy(steps: int) -> Recipe:
    return Recipe(
        steps=steps, step_tokens=1024, rates=((-1, 0.0), (0, 1.0), (12, 1.0)), long_rows=((9, 12),),
        mixes_from_steps=(0, 3, 6), layers=2, hidden=32, intermediate=64, heads=2, key_value_heads=1, head_size=16,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def shipped_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    monkeypatch.setattr(train, "train_tokenizer", lambda seed: shipped)


def test_it_learns_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out, state = tmp_path / "model", tmp_path / "state.pt"
    first = Trainer(toy(4))
    first.run(out, state)
    began = first.curve[0]["loss"]
    second = Trainer(toy(12))
    second.run(out, state)
    assert [at["step"] for at in second.curve] == [4, 12]
    assert second.curve[-1]["loss"] < began
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for mine, its in zip(second.model.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)  # float16 in the file


def test_the_rate_rises_stays_and_falls() -> None:
    recipe = Recipe(steps=100, rates=((-1, 0.0), (9, 1.0), (50, 1.0), (100, 0.0)))
    assert [recipe.rate_share(step) for step in (0, 9, 30, 75, 99)] == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.02])
    assert recipe.rate_share(101) == 0.0


def test_rows_are_full_and_begin_with_a_dialogue() -> None:
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    ids, weights = Packer(tokenizer, 3).rows(6, 256)
    again, _ = Packer(tokenizer, 3).rows(6, 256)
    assert ids.shape == weights.shape == (6, 257)
    assert torch.equal(ids, again)
    assert set(ids[:, 0].tolist()) == {tokenizer.token_to_id("<|begin|>")}
    assert sorted(set(weights.flatten().tolist())) == pytest.approx([HEARD_WEIGHT, 1.0])
