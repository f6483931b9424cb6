"""The language model inside a wrapper: its values and its tensors' names, as checkpoints of several years have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peerllm.engine.weights.checkpoint import read_model
from peerllm.errors import ModelError
from peerllm.wrapped_models import WRAPPERS, text_tensor, text_values
from tests.daemon.weights.hub_server import hole

LAYER = "layers.0.self_attn.q_proj.weight"
TEXT: dict[str, Any] = {"model_type": "mistral", "hidden_size": 8, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("name", "known_as"),
    [
        (f"language_model.model.{LAYER}", f"model.{LAYER}"),
        (f"model.language_model.{LAYER}", f"model.{LAYER}"),
        (f"model.language_model.model.{LAYER}", f"model.{LAYER}"),
        (f"model.text_model.{LAYER}", f"model.{LAYER}"),
        (f"model.{LAYER}", f"model.{LAYER}"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.language_model.embed_tokens_per_layer.weight", "model.embed_tokens_per_layer.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("visual.blocks.0.attn.qkv.weight", None),
        ("model.visual.blocks.0.attn.qkv.weight", None),
        (f"vision_tower.vision_model.encoder.{LAYER}", None),
        (f"model.vision_tower.{LAYER}", None),
        (f"model.vision_model.encoder.{LAYER}", None),
        ("model.audio_tower.conformer.0.norm.weight", None),
        ("model.embed_vision.embedding_projection.weight", None),
        ("multi_modal_projector.linear_1.weight", None),
        ("model.connector.modality_projection.proj.weight", None),
        ("mtp.layers.0.mlp.gate_proj.weight", None),
        ("image_newline", None),
    ],
)
def test_tensors_of_the_language_model_have_its_names_and_others_none(name: str, known_as: str | None) -> None:
    assert text_tensor(name) == known_as


def test_values_come_from_within_and_what_concerns_the_whole_checkpoint_from_outside() -> None:
    outer = {
        "model_type": "mistral3",
        "text_config": {**TEXT, "eos_token_id": [2, 3]},
        "vision_config": {"hidden_size": 99},
        "eos_token_id": 4,
        "quantization_config": {
            "quant_method": "fp8", "bits": 8, "modules_to_not_convert": ["language_model.lm_head", "vision_tower.x"],
        },
        "tie_word_embeddings": False,
        "peerllm_compute_dtype": "float32",
    }  # fmt: skip
    assert text_values(outer, headed=False) == {
        **TEXT,
        "eos_token_id": [4, 2, 3],
        "quantization_config": {
            "quant_method": "fp8", "bits": 8, "modules_to_not_convert": ["lm_head", "vision_tower.x"],
        },
        "tie_word_embeddings": False,
        "peerllm_compute_dtype": "float32",
    }  # fmt: skip


def test_where_nothing_is_said_the_files_tell_whether_the_head_is_tied() -> None:
    silent = {"model_type": "gemma3", "text_config": {"hidden_size": 8}}
    assert text_values(silent, headed=False)["tie_word_embeddings"] is True
    assert text_values(silent, headed=True)["tie_word_embeddings"] is False
    inner = {"model_type": "llava", "text_config": {"tie_word_embeddings": True}}
    assert text_values(inner, headed=True)["tie_word_embeddings"] is True
    assert text_values({**inner, "tie_word_embeddings": False}, headed=True)["tie_word_embeddings"] is False


def test_older_files_have_the_values_of_the_language_model_outside() -> None:
    older = {
        "model_type": "qwen2_5_vl", "hidden_size": 8, "vision_config": {"hidden_size": 99}, "vision_start_token_id": 7,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": True,
    }  # fmt: skip
    values = text_values(older, headed=False)
    assert (values["model_type"], values["hidden_size"]) == ("qwen2", 8)
    assert values["rope_scaling"] == {"type": "default"}
    assert values["rope_theta"] == 1e6
    assert not {key for key in values if "vision" in key}


def test_values_that_are_left_out_are_those_of_the_wrappers_own_configuration() -> None:
    from transformers import CONFIG_MAPPING

    for kind, wrapper in WRAPPERS.items():
        if not wrapper.text:  # then the language model's configuration is a whole one
            continue
        own = CONFIG_MAPPING[kind]().get_text_config().to_dict()
        plain = CONFIG_MAPPING[wrapper.text](**wrapper.left_out, **wrapper.always).to_dict()
        thetas = [(about.get("rope_parameters") or {}).get("rope_theta") for about in (own, plain)]
        assert thetas[0] == thetas[1], kind
        for key in ("rms_norm_eps", "num_key_value_heads", "max_position_embeddings", "hidden_act", "head_dim",
            "sliding_window", "max_window_layers", "attention_bias", "mlp_bias", "enable_moe_block"):  # fmt: skip
            if key in own and key in plain:
                assert own[key] == plain[key], (kind, key)


def outline(directory: Path, names: dict[str, str]) -> None:
    """A checkpoint without data in which each tensor of eight numbers stands in a file of its own."""
    (directory / "config.json").write_text(json.dumps({"model_type": "mistral3", "text_config": TEXT}))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for name, file in names.items():
        hole(directory / file, {name: {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}})


def test_files_without_the_language_model_need_not_be_there(tmp_path: Path) -> None:
    names = {"language_model.model.norm.weight": "a.safetensors", "vision_tower.norm.weight": "b.safetensors"}
    outline(tmp_path, names)
    (tmp_path / "b.safetensors").unlink()
    files = read_model(tmp_path, "auto", "none", False)
    assert {name: Path(at.path).name for name, at in files.tensors.items()} == {"model.norm.weight": "a.safetensors"}
    assert json.loads(files.config) == files.values == {**TEXT, "tie_word_embeddings": True}
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ModelError, match=r"a\.safetensors is missing"):
        read_model(tmp_path, "auto", "none", False)


def test_the_dtype_is_the_language_models(tmp_path: Path) -> None:
    outline(tmp_path, {"language_model.model.norm.weight": "a.safetensors", "vision_tower.w": "b.safetensors"})
    hole(tmp_path / "b.safetensors", {"vision_tower.w": {"dtype": "BF16", "shape": [99], "data_offsets": [0, 198]}})
    assert read_model(tmp_path, "auto", "none", False).dtype == "float32"


def test_two_tensors_that_would_have_one_name_are_refused(tmp_path: Path) -> None:
    outline(tmp_path, {"language_model.lm_head.weight": "a.safetensors", "lm_head.weight": "b.safetensors"})
    with pytest.raises(ModelError, match=r"lm_head\.weight stands in a\.safetensors and b\.safetensors"):
        read_model(tmp_path, "auto", "none", False)
