"""Damaged, dishonest and foreign model directories: one clear line each, before memory is taken."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from peerllm.engine.model.torch_inspect import inspect_model
from peerllm.engine.model.torch_shard import load_shard
from peerllm.engine.weights import checkpoint
from peerllm.engine.weights.checkpoint import read_header, read_tensors
from peerllm.errors import BadInputError, ModelError, RefusedError
from tests.engine.architectures import FAMILIES, generate, quiet, reference, save, stage, tiny_model
from tests.engine.runs import in_slot

LLAMA = next(family for family in FAMILIES if family.model_type == "llama")
MIXTRAL = next(family for family in FAMILIES if family.model_type == "mixtral")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    quiet()
    directory = tmp_path_factory.mktemp("llama")
    save(tiny_model(LLAMA, 1.0, 0), directory)
    return directory


@pytest.fixture
def model(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "model"))


def weights(model: Path) -> Path:
    return model / "model.safetensors"


def rewrite(model: Path, change) -> None:
    tensors = load_file(weights(model))
    change(tensors)
    save_file(tensors, weights(model))


def rewrite_header(model: Path, change) -> None:
    data = weights(model).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    weights(model).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def configure(model: Path, **values: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


NAME = "model.layers.1.self_attn.q_proj.weight"


def test_missing_tensor(model):
    rewrite(model, lambda tensors: tensors.pop(NAME))
    with pytest.raises(ModelError, match=f"{NAME} is missing"):
        inspect_model(model)


def test_wrong_shape(model):
    rewrite(model, lambda tensors: tensors.update({NAME: torch.zeros(3, 32)}))
    with pytest.raises(ModelError, match=r"shape \[3, 32\]; the model needs \[32, 32\]"):
        inspect_model(model)


def test_truncated_file(model):
    data = weights(model).read_bytes()
    weights(model).write_bytes(data[:-5])
    with pytest.raises(ModelError, match="cut short"):
        inspect_model(model)


@pytest.mark.parametrize(
    "data", [b"", b"1234", struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 2) + b"[]" + b"x" * 9]
)
def test_no_safetensors_file_at_all(model, data):
    weights(model).write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        inspect_model(model)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, 4096]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 2**62]},
        {"dtype": "F32", "shape": [-1, 4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [2**50, 2**50 + 4]},
        {"dtype": "Q4", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]},
        {"dtype": "F32"},
        7,
    ],
)
def test_header_that_lies(model, entry):
    rewrite_header(model, lambda header: header.update({NAME: entry}))
    with pytest.raises(ModelError, match="q_proj"):
        inspect_model(model)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", ""])
def test_index_that_leaves_the_directory(model, name):
    weights(model).rename(model.parent / "model.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NAME: name}}))
    with pytest.raises(ModelError, match="no safetensors file of the model's directory"):
        inspect_model(model)


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_index_that_is_none(model, index):
    (model / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=r"index\.json"):
        inspect_model(model)


def test_pickles_are_not_read(model):
    weights(model).unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        inspect_model(model)
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ModelError, match="holds pickles, which peerllm never reads"):
        inspect_model(model)


def test_code_of_the_model_never_runs(model):
    (model / "modeling_evil.py").write_text(f"open({str(model / 'pwned')!r}, 'w')\nclass Evil: pass\n")
    (model / "configuration_evil.py").write_text(f"open({str(model / 'pwned')!r}, 'w')\nclass Evil: pass\n")
    auto = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    configure(model, auto_map=auto)
    inspection = inspect_model(model)  # a known architecture: transformers' own code is used
    load_shard(stage(inspection, 0, 5))
    configure(model, model_type="evil")
    with pytest.raises(ModelError, match=r"unknown architecture 'evil'.*never run"):
        inspect_model(model)
    assert not (model / "pwned").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "t5"}, "'t5'"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "gemma3n_text"}, "'gemma3n_text'"),
        ({"model_type": ""}, "no model_type"),
        ({"model_type": 5}, "no model_type"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized .gptq."),
        ({"hidden_size": "many"}, r"config\.json of 'llama'"),
        ({"num_hidden_layers": 6}, r"layers\.4\..* is missing"),
        ({"num_attention_heads": 0}, "llama"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_hidden_layers": 0}, "0 layers"),
    ],
)
def test_configurations_that_cannot_be_used(model, values, message):
    configure(model, **values)
    with pytest.raises(ModelError, match=message):
        inspect_model(model)


def test_no_config_and_no_directory(model):
    (model / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        inspect_model(model)
    (model / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        inspect_model(model)
    with pytest.raises(ModelError, match="no directory"):
        inspect_model(model / "nowhere")


def test_file_that_shrinks_after_it_was_inspected(model):
    inspection = inspect_model(model)
    weights(model).write_bytes(weights(model).read_bytes()[:5000])
    with pytest.raises(ModelError, match="in the middle of tensor"):
        load_shard(stage(inspection, 0, 5))
    weights(model).unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        load_shard(stage(inspection, 0, 5))


def test_expert_that_is_missing(tmp_path):
    quiet()
    save(tiny_model(MIXTRAL, 1.0, 0), tmp_path)
    victim = next(name for name in load_file(weights(tmp_path)) if "layers.2" in name and ".experts.1.w2" in name)
    rewrite(tmp_path, lambda tensors: tensors.pop(victim))
    with pytest.raises(ModelError, match="experts"):
        inspect_model(tmp_path)


def test_tensors_of_other_layers_are_not_read(model):
    """A block's shard loads although every other tensor's bytes are gone."""
    inspection = inspect_model(model)
    spec = stage(inspection, 2, 2)
    end = max(tensor.offset + tensor.nbytes for tensor in spec.tensors)
    start = min(tensor.offset for tensor in spec.tensors)
    data = bytearray(weights(model).read_bytes())
    data[:start] = b"\xff" * start
    weights(model).write_bytes(bytes(data[:end]))
    shard = load_shard(spec)
    assert np.isfinite(shard.forward(np.ones((3, 32), np.float32), [in_slot(0, 0, 3)])).all()
    assert shard.weight_bytes == inspection.profile.layers[2].memory_bytes


def test_tensors_that_are_no_numbers_are_loaded(model):
    rewrite(model, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].fill_(float("nan")))
    shard = load_shard(stage(inspect_model(model), 1, 2))
    assert np.isnan(shard.forward(np.ones((2, 32), np.float32), [in_slot(0, 0, 2)])).any()


def test_stage_without_its_tensors(model):
    inspection = inspect_model(model)
    spec = stage(inspection, 1, 2)
    from dataclasses import replace

    with pytest.raises(ModelError, match="is missing"):
        load_shard(replace(spec, tensors=spec.tensors[1:]))
    with pytest.raises(BadInputError, match="layers"):
        load_shard(replace(spec, last_layer=9))
    with pytest.raises(BadInputError, match="dtype"):
        load_shard(replace(spec, dtype="int3"))


def test_many_files_and_links_into_a_store(model, tmp_path):
    """As in the hub's cache: names that link to blobs elsewhere."""
    whole = inspect_model(model)
    tensors = load_file(weights(model))
    names = sorted(tensors)
    store = tmp_path / "blobs"
    store.mkdir()
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, store / f"blob{number}")
        (model / f"model-{number}.safetensors").symlink_to(store / f"blob{number}")
        index.update(dict.fromkeys(part, f"model-{number}.safetensors"))
    weights(model).unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    split = inspect_model(model)
    assert split.profile.layers == whole.profile.layers
    load_shard(stage(split, 0, 5))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_auto_dtype_is_what_the_files_hold_unless_the_model_says_otherwise(model, dtype):
    rewrite(model, lambda t: t.update({name: tensor.to(getattr(torch, dtype)) for name, tensor in t.items()}))
    assert inspect_model(model).dtype == dtype
    assert inspect_model(model, "float32").dtype == "float32"
    configure(model, peerllm_compute_dtype="float32")
    assert inspect_model(model).dtype == "float32"
    with pytest.raises(ModelError, match="dtype must be one of"):
        inspect_model(model, "int8")


@pytest.mark.parametrize(
    ("held", "dtype", "accelerator", "quantize"),
    [
        ("bfloat16", "auto", False, "int8"),
        ("float16", "auto", False, "int8"),
        ("bfloat16", "auto", True, ""),
        ("bfloat16", "float32", False, ""),
        ("float32", "auto", False, ""),
    ],
)
def test_auto_rounds_what_is_held_in_16_bits(model, held, dtype, accelerator, quantize):
    rewrite(model, lambda t: t.update({name: tensor.to(getattr(torch, held)) for name, tensor in t.items()}))
    assert inspect_model(model, dtype, "auto", accelerator).quantize == quantize
    assert inspect_model(model, dtype, "none", accelerator).quantize == ""
    assert inspect_model(model, dtype, "int4", accelerator).quantize == "int4"
    with pytest.raises(BadInputError, match="int8 or int4"):
        inspect_model(model, dtype, "int2")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_is_near_the_whole_model(model, dtype):
    from transformers import AutoModelForCausalLM

    rewrite(model, lambda t: t.update({name: tensor.to(getattr(torch, dtype)) for name, tensor in t.items()}))
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    prompt = np.arange(3, 12)
    tokens, logits = reference(whole, prompt)
    inspection = inspect_model(model)
    chain = [load_shard(stage(inspection, a, b)) for a, b in ((0, 1), (2, 3), (4, 5))]
    got, steps = generate([shard.forward for shard in chain], prompt, (9,))
    assert steps[0].dtype == np.float32
    assert np.abs(steps[0] - logits[0]).max() < 0.05 * np.abs(logits[0]).max()
    assert got[0] == tokens[0]


def test_progress_rises_to_the_total(model):
    inspection = inspect_model(model)
    spec, told = stage(inspection, 1, 3), []
    load_shard(spec, lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] == sum(tensor.nbytes for tensor in spec.tensors)


def test_profile_matches_what_is_loaded(model):
    inspection = inspect_model(model)
    for number, layer in enumerate(inspection.profile.layers):
        shard = load_shard(stage(inspection, number, number, slots=3, context=20))
        assert shard.weight_bytes == layer.memory_bytes
        assert shard.kv_bytes == layer.kv_bytes_per_token * 3 * 20
    assert inspection.profile.layers[1].kv_bytes_per_token == 2 * 2 * 8 * 4
    assert inspection.vocabulary == 101
    assert inspection.hidden_size == 32
    assert inspection.max_context == 64


def test_stop_ids_of_both_files(model):
    configure(model, eos_token_id=2)
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert inspect_model(model).stop_ids == (2, 7)


def test_the_same_tensor_in_two_files(model):
    shutil.copy(weights(model), model / "other.safetensors")
    weights(model).rename(model / "one.safetensors")
    with pytest.raises(ModelError, match="stands in"):
        read_tensors(model)


def test_header_larger_than_allowed(model, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_HEADER_BYTES", 16)
    with pytest.raises(ModelError, match="no complete safetensors file"):
        read_header(weights(model))


def test_kv_beyond_the_promise_is_refused_before_it_is_taken(model):
    """Whatever slots and context a coordinator asks for: here 2 TB."""
    spec = stage(inspect_model(str(model), "auto"), 1, 2, slots=2**16, context=2**20)
    with pytest.raises(RefusedError, match="are promised"):
        load_shard(replace(spec, limit_bytes=1 << 20))
