"""A Llama whose file has GGML blocks: exactly the numbers of the file in float32, and near them where it is computed
with whole numbers.
"""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from peerllm.engine.backends import Backends
from peerllm.engine.graph.describe import describe
from peerllm.engine.graph.experts import LAYERS as LAYERS_OF_EXPERTS
from peerllm.engine.graph.matrix_product import check
from peerllm.engine.messages import LoadStage, TensorAt
from peerllm.engine.weights.formats import forms_of
from peerllm.engine.weights.tensors import Checkpoint
from peerllm.errors import ModelError
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
    blocks, floats, types = File(root / "blocks.gguf"), File(root / "floats"), {}

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


# ---- experts ------------------------------------------------------------------------------------------------------

EXPERTS, NARROW = 4, 256
MIXED: dict[str, Any] = {
    **CONFIG, "model_type": "qwen3_moe", "num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": True,
    "moe_intermediate_size": NARROW,
}  # fmt: skip
EXPERT_SHAPES = {"gate_proj": (NARROW, HIDDEN), "up_proj": (NARROW, HIDDEN), "down_proj": (HIDDEN, NARROW)}
STACKED = "mlp.experts"


def write_experts(
    root: Path, kinds: tuple[str, str, str]
) -> tuple[dict[str, Any], list[TensorAt], dict[str, Any], list[TensorAt]]:
    """As `write`, with stacks of experts in `kinds`; in float32 they are a tensor each."""
    config, blocks, floats = write(root, paired=False)
    more, types = (File(root / "experts"), File(root / "floats of experts")), config["quantization_config"]["types"]
    for number in range(LAYERS):
        layer = f"model.layers.{number}"
        router = np.random.default_rng(number).standard_normal((EXPERTS, HIDDEN)).astype(np.float32)
        for file in more:
            file.add(f"{layer}.mlp.gate.weight", "F32", router.shape, router)
            for which in ("q_norm", "k_norm"):
                file.add(f"{layer}.self_attn.{which}.weight", "F32", (WIDTH,), np.ones(WIDTH, np.float32))
        for (which, (rows, columns)), kind in zip(EXPERT_SHAPES.items(), kinds, strict=True):
            data = blocks_of(kind, EXPERTS * rows, columns, seed=100 + number)
            more[0].add(f"{layer}.{STACKED}.{which}.weight", kind, (EXPERTS, rows, columns), data)
            types[f"{layer}.{STACKED}.{which}.weight"] = kind
            for expert, own in enumerate(read(kind, data).reshape(EXPERTS, rows, columns)):
                more[1].add(f"{layer}.{STACKED}.{expert}.{which}.weight", "F32", (rows, columns), own)
    about = {**config["quantization_config"], "experts": "stacked"}
    return {**MIXED, "quantization_config": about}, blocks + more[0].tensors, MIXED, floats + more[1].tensors


@pytest.mark.parametrize(
    ("kinds", "layout", "exact"),
    [
        (("Q4_0", "Q4_0", "Q4_0"), (4, 32), True),
        (("Q3_K", "Q3_K", "Q4_0"), (4, 16), True),
        (("Q4_0", "Q4_0", "Q6_K"), (8, 16), True),
        (("MXFP4", "Q8_0", "IQ4_NL"), (8, 32), True),
        (("Q4_K", "Q4_K", "Q6_K"), (8, 16), False),
        (("Q5_K", "Q5_K", "Q5_1"), (8, 32), False),
    ],
)
def test_experts_are_the_files(
    kinds: tuple[str, str, str], layout: tuple[int, int], exact: bool, tmp_path: Path
) -> None:
    config, blocks, whole, floats = write_experts(tmp_path, kinds)
    meant = logits(whole, floats, "")
    assert np.array_equal(logits(config, blocks, ""), meant), "in float32 bit for bit"
    described, tensors = describe(config, kept=True), Checkpoint(blocks)
    weights = described.blocks[0]
    experts, stacks = weights.block.mlp.experts, weights.stacks
    assert experts is not None and stacks is not None
    held = stacks.layout(experts, HIDDEN, 8)
    assert (held.bits, held.block) == layout
    for layer in LAYERS_OF_EXPERTS:
        made = stacks.coded(tensors, experts, HIDDEN, 1, layer, held).floats()
        numbers = stacks.floats(tensors, experts, HIDDEN, 1, layer)
        if exact or (layer and kinds[2] == "Q6_K"):
            assert np.array_equal(made, numbers)
        else:
            assert not np.array_equal(made, numbers), "what has minima is rounded ..."
            assert np.abs(made - numbers).max() < np.abs(numbers).max() / 200, "... to 8 bits"
    kept = logits(config, blocks, "stored")
    likeness = (kept * meant).sum(1) / np.linalg.norm(kept, axis=1) / np.linalg.norm(meant, axis=1)
    assert np.median(likeness) > 0.99, "inputs are rounded, which may send a token elsewhere"


@pytest.mark.parametrize("biased", ["v", "qv", "short q"])
def test_biases_of_some_parts_alone_are_refused(tmp_path: Path, biased: str) -> None:
    """Rows of queries and keys are stored in another order; their biases count all the same."""
    config, blocks, _ = write(tmp_path, paired=True)
    more = File(tmp_path / "more.gguf")
    sizes = {"q": HEADS * WIDTH, "k": GROUPS * WIDTH, "v": GROUPS * WIDTH}
    for role in "qkv" if biased.startswith("short") else biased:
        size = sizes[role] - (biased == f"short {role}")
        more.add(f"model.layers.0.self_attn.{role}_proj.bias", "F32", (size,), np.zeros(size, np.float32))
    product = describe(config).blocks[0].products["qkv"]
    with pytest.raises(ModelError, match=r"self_attn\.[qk]_proj\.bias"):
        check(Checkpoint([*blocks, *more.tensors]), product)


def test_tiles_wider_than_a_matrix_take_no_memory_for_what_is_not_there() -> None:
    matrix = {"w.weight": np.ones((64, 16), ml_dtypes.float8_e4m3fn), "w.weight_scale_inv": np.full((1, 1), 2.0, "f4")}

    class Held:
        def stored(self, name: str) -> npt.NDArray[Any]:
            return matrix[name]

    config = {"quant_method": "fp8", "weight_block_size": [64, 65536], "found": {"scale": "weight_scale_inv"}}
    form = forms_of({"model_type": "llama", "quantization_config": {**config, "floats": []}})("w.weight")
    assert form is not None
    tracemalloc.start()
    floats = form.floats(Held(), "w.weight", slice(None))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(floats, np.full((64, 16), 2, np.float32)) and most < 1 << 20
