"""Every family of the table computes what transformers computes: in chunks, batches of slots and after going back."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch

from peerllm.engine.base import ROLLBACK_TOKENS
from peerllm.engine.graph.config_values import UnfitError
from peerllm.engine.graph.describe import describe
from peerllm.engine.graph.rotation import inverse_frequencies, tables
from peerllm.engine.graph.structure import Rope
from peerllm.engine.graph.table import FAMILIES
from peerllm.transport.frames.token_run import TokenRun
from tests.engine.graph.variants import (
    BY_KIND,
    CONTEXT,
    LINEAR,
    LLAMA3,
    SLOTS,
    VARIANTS,
    YARN,
    Made,
    config_of,
    make,
)
from tests.engine.runs import in_slot
from tests.sizes import FULL

TOLERANCE = 1e-4  # of the largest logit
# The delta rule's heads give almost nothing at some positions, which their norm then makes large: there float32 differs
# from float64 by up to 5e-4 of the largest logit in transformers and in graphs, and elsewhere by 1e-6.
RARELY, MOSTLY = 2e-3, 1e-5
NORMED_HEADS = {"qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"}
CASES = [(model_type, number) for model_type, variants in VARIANTS.items() for number in range(len(variants))]
NUMBERS = {case: crc32(f"{case}".encode()) for case in CASES}  # a new variant changes no other's weights
SIZES = {
    "hidden_size", "n_embd", "vocab_size", "num_hidden_layers", "n_layer", "num_layers", "num_attention_heads",
    "num_heads", "n_head", "intermediate_size", "max_position_embeddings", "n_positions",
}  # fmt: skip
NEEDED = {"deepseek_v2": {"num_experts_per_tok": 6}}  # the class has no default with which it works


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Made]:
    def one(model_type: str, number: int) -> Made:
        place = NUMBERS[model_type, number]
        return make(model_type, place, VARIANTS[model_type][number], tmp_path_factory.mktemp("model"))

    return cache(one)


pytestmark = pytest.mark.usefixtures("calm")


def forward(model: Made, ids: Any, runs: Sequence[TokenRun]) -> Any:
    for shard in model.shards:
        ids = shard.forward(ids, runs)
    return ids


def walk(model: Made, draw: random.Random, passes: int, tolerance: float) -> list[float]:
    """Passes as a scheduler could ask for them; every logit is compared: by how much each token's differed."""
    found: list[float] = []
    lengths, furthest = [0] * SLOTS, [0] * SLOTS
    for slot in range(SLOTS):
        for shard in model.shards:
            shard.release(slot)
    largest = np.abs(model.logits).max()
    anywhere = not any(state.fixed for state in model.described.model.states())  # else only to the beginning
    for _ in range(passes):
        slots = draw.sample(range(SLOTS), draw.randint(1, SLOTS))
        for slot in slots:
            if draw.random() < 0.4 or lengths[slot] == CONTEXT:
                back = draw.choice((1, draw.randint(1, ROLLBACK_TOKENS))) if anywhere else CONTEXT
                lengths[slot] = min(lengths[slot], max(furthest[slot] - back, 0))
        count = 1 if len(slots) > 1 else min(draw.choice((1, 2, 7, 33, 150)), CONTEXT - lengths[slots[0]])
        runs = [in_slot(slot, lengths[slot], count, draw.random() < 0.9) for slot in slots]
        ids = np.concatenate([model.ids[slot, lengths[slot] : lengths[slot] + count] for slot in slots])
        got = forward(model, ids, runs)
        wanted = [model.logits[part.slot, part.position + count - 1] for part in runs if part.sample]
        assert got.shape == (len(wanted), model.logits.shape[-1])
        if wanted:
            found += (np.abs(got - np.array(wanted)).max(1) / largest).tolist()
            assert max(found) <= tolerance
        for slot in slots:
            lengths[slot] += count
            furthest[slot] = max(furthest[slot], lengths[slot])
    return found


@pytest.mark.parametrize(("model_type", "number"), CASES)
def test_logits_equal_those_of_transformers(model_type: str, number: int, made: Callable[[str, int], Made]) -> None:
    model = made(model_type, number)
    for slot in range(SLOTS):  # a long prompt at once, then steps together
        forward(model, model.ids[slot, : CONTEXT - 3], [in_slot(slot, 0, CONTEXT - 3)])
    steps = [in_slot(slot, CONTEXT - 3, 1, True) for slot in (2, 0, 1)]
    got = forward(model, model.ids[[2, 0, 1], CONTEXT - 3], steps)
    tolerance = RARELY if model_type in NORMED_HEADS else TOLERANCE
    assert np.abs(got - model.logits[[2, 0, 1], CONTEXT - 3]).max() <= tolerance * np.abs(model.logits).max()

    for turn in range(25 if FULL else 1):
        found = walk(model, random.Random(f"{model_type} {number} {turn}"), 30 if FULL else 16, tolerance)
        assert model_type not in NORMED_HEADS or np.median([0.0, *found]) <= MOSTLY


@pytest.mark.parametrize(("model_type", "number"), CASES if FULL else [one for one in CASES if not one[1]])
def test_last_states_equal_those_of_transformers(
    model_type: str, number: int, made: Callable[[str, int], Made]
) -> None:
    model = made(model_type, number)
    for shard in model.shards:
        shard.release(0)
    found = []
    for start, length in ((0, 40), (40, 1), (41, CONTEXT - 41)):
        part = in_slot(0, start, length, start > 0)
        rows: Any = model.ids[0, start : start + length]
        for shard in model.shards[:-1]:
            rows = shard.forward(rows, [part])
        found.append(model.shards[-1].last_states(rows, part))
    got, tolerance = np.concatenate(found), RARELY if model_type in NORMED_HEADS else TOLERANCE
    assert got.shape == model.states.shape
    assert np.abs(got - model.states).max() <= tolerance * np.abs(model.states).max()


def test_every_family_has_a_variant() -> None:
    assert set(VARIANTS) == set(FAMILIES)


def same(some: dict[str, Any], completed: dict[str, Any]) -> None:
    """What config.json says describes what transformers makes of it."""
    one, other = describe(some), describe({**completed, "model_type": some["model_type"]})
    assert one.model == other.model
    assert one.tied == other.tied
    assert [list(block.tensors()) for block in one.blocks] == [list(block.tensors()) for block in other.blocks]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_values_that_are_left_out_are_those_of_the_configuration_class(model_type: str) -> None:
    sizes = {key: value for key, value in config_of(model_type).to_dict().items() if key in SIZES and value is not None}
    sizes |= NEEDED.get(model_type, {})
    same({"model_type": model_type, **sizes}, config_of(model_type, **sizes).to_dict())


OLDER: list[dict[str, Any]] = [
    {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": {**LLAMA3["rope_parameters"], "rope_theta": 7.0}},
    {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"model_type": "qwen2", "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
    {"model_type": "qwen3", "rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    {"model_type": "llama", "original_max_position_embeddings": 99, **YARN},
    {"model_type": "phi", "partial_rotary_factor": 0.25, "rope_theta": 3000.0},
    {"model_type": "stablelm", "partial_rotary_factor": 0.75, "rope_parameters": {"partial_rotary_factor": 0.5}},
    {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 25000},
    {"model_type": "gemma3_text", "rope_theta": 2e6, "rope_local_base_freq": 9000.0, "sliding_window_pattern": 2},
    {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}, **BY_KIND},
    {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    {"model_type": "gemma3_text", **LINEAR},
    {"model_type": "gemma4_text", "layer_types": ["full_attention", *["sliding_attention"] * 29]},
    {"model_type": "olmo3", "rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "truncate": False}},
    {"model_type": "llama", "layer_types": ["sliding_attention"] * 32, "sliding_window": 7, "logit_scale": 2.0},
    {"model_type": "llama", "num_key_value_heads": None, "head_dim": None, "partial_rotary_factor": 0.5},
    {"model_type": "cohere2", "head_dim": 64},
    {"model_type": "exaone4", "sliding_window_pattern": "LLLG", "layer_types": ["full_attention"] * 32},
    {"model_type": "granite", "attention_multiplier": 0.0078125, "final_logit_softcapping": 3.0},
    {"model_type": "lfm2", "full_attn_idxs": [2, 5], "block_ff_dim": 1000, "tie_embedding": False},
    {"model_type": "lfm2", "block_ffn_dim_multiplier": 1.3, "rope_theta": 5000.0, "head_dim": 64},
    {"model_type": "lfm2_moe", "tie_embedding": False, "layer_types": ["conv", "full_attention"] * 16},
    {"model_type": "qwen3_5_text", "full_attention_interval": 3, "rope_theta": 1e7},
    {"model_type": "qwen3_5_text", "rope_parameters": {"partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2]}},
    {"model_type": "qwen3_5_moe_text", "partial_rotary_factor": 0.5, "norm_topk_prob": False},
    {"model_type": "qwen3_next", "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": False},
    {"model_type": "granitemoehybrid", "num_local_experts": 0, "layer_types": ["mamba", "attention"] * 16},
    {"model_type": "granitemoehybrid", "position_embedding_type": "rope", "time_step_limit": [0.0, float("inf")]},
    {"model_type": "deepseek_v2", "num_experts_per_tok": 6, "norm_topk_prob": True, "v_head_dim": 64},
    {"model_type": "deepseek_v3", "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}},
    {"model_type": "deepseek_v3", "rope_interleave": False, "q_lora_rank": None, "head_dim": 4},
    {"model_type": "glm4_moe_lite", "mlp_layer_types": ["dense", "dense", "sparse"] + ["dense"] * 44},
    {"model_type": "minicpm3", "scale_emb": 3, "scale_depth": None, "dim_model_base": None, "v_head_dim": None},
    {"model_type": "youtu", "rope_theta": 1.6e6, "tie_word_embeddings": False},
]


@pytest.mark.parametrize("config", OLDER, ids=lambda config: config["model_type"])
def test_keys_are_read_as_transformers_reads_them(config: dict[str, Any]) -> None:
    values = {key: value for key, value in config.items() if key != "model_type"}
    sizes = {key: value for key, value in config_of(config["model_type"]).to_dict().items() if key in SIZES}
    same({**sizes, **config}, config_of(config["model_type"], **sizes, **values).to_dict())


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("bloom", {}),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    ("llama", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": None}}),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0.0}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}),
    ("llama", BY_KIND),
    ("llama", {"hidden_act": "xielu"}),
    ("gemma4_text", {"hidden_size_per_layer_input": 1 << 20}),
    ("llama", {"head_dim": 20}),
    ("llama", {"num_key_value_heads": 5}),
    ("llama", {"per_layer_config": {"0": {"num_key_value_heads": 4}}}),
    ("llama", {"rms_norm_eps": float("nan")}),
    ("llama", {"num_hidden_layers": 4096}),
    ("llama", {"vocab_size": None}),
    ("phi3", {"rope_parameters": {"rope_type": "yarn", "short_factor": [1.0], "factor": 2.0}}),
    ("qwen2", {"layer_types": ["full_attention"]}),
    ("qwen2", {"layer_types": ["chunked_attention"] * 32}),
    ("mixtral", {"hidden_act": "gelu"}),
    ("mixtral", {"num_experts_per_tok": 9}),
    ("gemma", {"use_bidirectional_attention": True}),
    ("gemma3_text", {"use_bidirectional_attention": True}),
    ("falcon", {"alibi": True}),
    ("opt", {"do_layer_norm_before": False}),
    ("opt", {"word_embed_proj_dim": 512}),
    ("olmoe", {"clip_qkv": 8.0}),
    ("granite_swa", {"layer_rope_theta": [1e4, 0] * 12}),
    ("hunyuan_v1_dense", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("lfm2", {"conv_L_cache": 0, "full_attn_idxs": []}),
    ("lfm2", {"layer_types": ["conv", "linear_attention"] * 16}),
    ("qwen3_5_text", {"hidden_act": "gelu"}),
    ("qwen3_5_text", {"linear_num_value_heads": 33}),
    ("qwen3_5_text", {"linear_key_head_dim": 1 << 23}),
    ("qwen3_next", {"hidden_act": "relu"}),
    ("granitemoehybrid", {"hidden_act": "gelu"}),
    ("granitemoehybrid", {"time_step_limit": [0.001, float("inf")]}),
    ("granitemoehybrid", {"time_step_limit": [0.0, 0.1]}),
    ("granitemoehybrid", {"mamba_n_groups": 3}),
    ("granitemoehybrid", {"mamba_d_head": 1 << 23}),
    ("deepseek_v3", {"topk_group": 1, "num_experts_per_tok": 64}),
    ("deepseek_v3", {"n_group": 7}),
    ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True}),
    ("deepseek_v3", {"qk_rope_head_dim": 3}),
    ("deepseek_v3", {"kv_lora_rank": 1 << 23}),
    ("deepseek_v3", {"rope_scaling": {"rope_type": "yarn", "factor": None, "mscale_all_dim": 1.0}}),
    ("glm4_moe_lite", {"partial_rotary_factor": 0.5}),
    ("minicpm3", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}),
]


@pytest.mark.parametrize(("model_type", "values"), REFUSED)
def test_what_is_not_computed_exactly_is_refused(model_type: str, values: dict[str, Any]) -> None:
    sizes = {key: value for key, value in config_of(model_type).to_dict().items() if key in SIZES}
    with pytest.raises(UnfitError):
        describe({"model_type": model_type, **sizes, **values})
    if model_type in FAMILIES:
        describe({"model_type": model_type, **sizes})


@pytest.mark.parametrize("part", [1.0, 0.5])
@pytest.mark.parametrize("scaling", [{}, LINEAR, LLAMA3, YARN], ids=["default", "linear", "llama3", "yarn"])
def test_rotations_equal_those_of_transformers_far_out(scaling: dict[str, Any], part: float) -> None:
    from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

    parameters = {"rope_theta": 5000.0, **scaling.get("rope_parameters", {}), "partial_rotary_factor": part}
    config = config_of("phi", hidden_size=64, num_attention_heads=2, rope_parameters=parameters)
    theta = parameters.pop("rope_theta")
    rope = Rope(int(32 * part), theta, False, tuple(sorted(parameters.items())))
    reference = PhiRotaryEmbedding(config)
    frequencies, _ = inverse_frequencies(rope)
    np.testing.assert_allclose(frequencies, reference.inv_freq.numpy(), rtol=2.5e-7)
    places = [0, 1, 63, 64, 1000, 20_000, 300_000]
    made = tables(rope, places[-1] + 1)
    wanted = reference(torch.zeros(1), torch.tensor([places]))
    rounding = 1e-5 + 2.5e-7 * np.array(places)[:, None] * frequencies  # of the frequencies, times the distance
    for mine, theirs in zip(made, wanted, strict=True):
        assert (np.abs(mine[places] - theirs[0, :, : len(frequencies)].numpy()) <= rounding).all()
