"""A Llama whose file has GGML blocks: exactly the numbers of the file in float32, and near them where it is computed
with whole numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from peerllm.engine.backends import Backends
from peerllm.engine.messages import LoadStage, TensorAt
from tests.engine.runs import in_slot
from tests.engine.weights.ggml_tensors import File, blocks_of, read

HIDDEN, WIDE, HEADS, GROUPS, WIDTH, VOCABULARY, LAYERS = 256, 512, 4, 2, 64, 67, 2
CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": WIDTH, "vocab_size": VOCABULARY,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (HEADS * WIDTH, HIDDEN), "self_attn.k_proj": (GROUPS * WIDTH, HIDDEN),
    "self_attn.v_proj": (GROUPS * WIDTH, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * WIDTH),
    "mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN), "mlp.down_proj": (HIDDEN, WIDE),
}  # fmt: skip
TYPES = ["Q4_K", "Q4_K", "Q6_K", "Q5_0", "Q4_K", "Q4_1", "Q3_K"]  # of those, of embedding and head: Q6_K
IDS = np.random.default_rng(1).integers(0, VOCABULARY, 12)


def halves(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """From rows in rotated pairs to the order of transformers, as its reader of GGUF files does it."""
    return rows.reshape(heads, WIDTH // 2, 2, -1).swapaxes(2, 1).reshape(rows.shape)


def write(root: Path, paired: bool) -> tuple[dict[str, Any], list[TensorAt], list[TensorAt]]:
    """config.json, the tensors in blocks, and the same numbers in float32."""
    blocks, floats, types = File(root / "blocks"), File(root / "floats"), {}

    def add(name: str, kind: str, shape: tuple[int, int], heads: int = 0) -> None:
        data = blocks_of(kind, *shape, seed=len(types))
        numbers = read(kind, data)
        blocks.add(name, kind, shape, data)
        floats.add(name, "F32", shape, halves(numbers, heads) if heads and paired else numbers)
        types[name] = kind

    for number in range(LAYERS):
        for (name, shape), kind in zip(SHAPES.items(), TYPES, strict=True):
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": GROUPS}.get(name, 0)
            add(f"model.layers.{number}.{name}.weight", kind, shape, heads)
    add("model.embed_tokens.weight", "Q6_K", (VOCABULARY, HIDDEN))
    norms = [f"layers.{n}.{which}_layernorm" for n in range(LAYERS) for which in ("input", "post_attention")]
    for name in (*norms, "norm"):
        for file in (blocks, floats):
            file.add(f"model.{name}.weight", "F32", (HIDDEN,), np.full(HIDDEN, 0.2, np.float32))
    about = {"quant_method": "gguf", "types": types, "paired": paired}
    return {**CONFIG, "quantization_config": about}, blocks.tensors, floats.tensors


def logits(config: dict[str, Any], tensors: list[TensorAt], quantize: str) -> npt.NDArray[np.float32]:
    """Of a prompt's first eight tokens at once and the others one by one: of each of those [n, vocabulary]."""
    spec = LoadStage(
        1, "d", 1, 0, 1, 0, LAYERS + 1, json.dumps(config), tuple(tensors), "float32", 1, 32, 16, 1, None, None, "me",
        quantize=quantize,
    )  # fmt: skip
    loading = True

    def told(done: int, total: int) -> None:
        assert loading, "rows of the embedding that are looked up are not loaded"

    shard = Backends().load(spec, told)
    loading = False
    shard.forward(IDS[:8], [in_slot(0, 0, 8, False)])
    rows = [shard.forward(IDS[n : n + 1], [in_slot(0, n, 1, True)])[0].copy() for n in range(8, len(IDS))]
    shard.close()
    return np.array(rows)


@pytest.mark.parametrize("paired", [True, False])
def test_the_numbers_of_the_file_are_computed_with(paired: bool, tmp_path: Path) -> None:
    config, blocks, floats = write(tmp_path, paired)
    exact, meant = logits(config, blocks, ""), logits(CONFIG, floats, "")
    assert np.array_equal(exact, meant), "in float32 bit for bit"
    kept = logits(config, blocks, "stored")
    likeness = (kept * meant).sum(1) / np.linalg.norm(kept, axis=1) / np.linalg.norm(meant, axis=1)
    assert likeness.min() > 0.999, "only inputs are rounded"
    again = logits(config, blocks, "int4")
    rougher = (again * meant).sum(1) / np.linalg.norm(again, axis=1) / np.linalg.norm(meant, axis=1)
    assert np.median(rougher) < np.median(likeness), "rounded again, since that was asked for"
    turned = {**config, "quantization_config": {**config["quantization_config"], "paired": not paired}}
    assert not np.allclose(logits(turned, blocks, ""), meant), "a control"
