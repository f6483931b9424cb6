"""A config.json from another device, made to choose code or to take time and memory: refused before it can."""

from __future__ import annotations

import json
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from peerllm.engine.backends import Backends
from peerllm.engine.graph.describe import describe
from peerllm.engine.messages import Inspect
from peerllm.engine.model import assembly
from peerllm.engine.model.config import CODE_KEYS, MAX_COUNT, parse_config
from peerllm.engine.model.torch_inspect import inspect_model
from peerllm.engine.model.torch_shard import load_shard
from peerllm.errors import ModelError
from tests.engine.architectures import stage
from tests.engine.tiny import make_llama

LLAMA = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}


@pytest.mark.parametrize(
    "key",
    [
        "num_labels",
        "num_hidden_layers",
        "num_attention_heads",
        "num_experts",
        "n_routed_experts",
        "n_layer",
        "altup_num_inputs",
    ],
)
def test_counts_are_bounded_before_a_list_is_made_of_them(key: str) -> None:
    with pytest.raises(ModelError, match=f"not usable: {key}.*{MAX_COUNT}"):
        parse_config(json.dumps(LLAMA | {key: 200_000}))
    with pytest.raises(ModelError, match=f"{key}.*{MAX_COUNT}"):
        parse_config(json.dumps(LLAMA | {"text_config": {key: 200_000}}))


@pytest.mark.parametrize("key", [*sorted(CODE_KEYS), "auto_map"])
def test_no_config_chooses_code_at_any_depth(key: str) -> None:
    values = LLAMA | {key: "who/knows"} | ({"part": {key: "who/knows"}} if key in CODE_KEYS else {})
    config = parse_config(json.dumps(values))
    assert "who/knows" not in json.dumps(config.to_dict())
    assert config._attn_implementation in (None, "sdpa", "eager")


def test_tables_that_no_file_holds_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inspection = inspect_model(make_llama(tmp_path))
    load_shard(stage(inspection, 0, 0)).close()
    monkeypatch.setattr(assembly, "MAX_TABLE_BYTES", 1 << 20)
    wide = json.loads(inspection.config) | {"head_dim": 1 << 20}  # an embedding alone has no tensor to tell on it
    with pytest.raises(ModelError, match="no file holds"):
        load_shard(replace(stage(inspection, 0, 0), config=json.dumps(wide)))


# ---- the graph engine ------------------------------------------------------------------------------------------------

SIZES = ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
         "num_hidden_layers", "max_position_embeddings")  # fmt: skip
JUNK = (10**9, 2**62, 10**30, -1, 0, 1.5, float("nan"), "8", True, [], [[[]]], {"a": {}})
ROPES = (
    "x", 7, {"rope_type": ["yarn"]}, {"rope_type": "x" * 10_000}, {"rope_type": "linear", "factor": [1]},
    {"rope_type": "linear", "factor": "x"}, {"rope_type": "linear", "factor": 0}, {"rope_theta": "x"},
    {"rope_theta": -1.0}, {"rope_theta": float("nan")}, {"rope_type": "yarn", "factor": {}}, {"a": {"b": 1}},
    {"rope_type": "llama3", "factor": 8.0},
)  # fmt: skip
CASES = [
    *((key, value) for key in SIZES for value in JUNK if (key, value) != ("num_key_value_heads", True)),
    *(("rope_parameters", value) for value in ROPES),
    *(("hidden_act", value) for value in ("x" * 10**5, [], {}, 7)),
    *(("rms_norm_eps", value) for value in (float("nan"), float("inf"), "x", [])),
]
LIMIT_S, LIMIT_BYTES, LINE = 10.0, 32 << 20, 500


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Backends:
    """What computes where torch is not installed."""
    monkeypatch.setitem(sys.modules, "peerllm.engine.model.torch_backend", None)
    return Backends()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"), attention_bias=True)


def changed(model: Path, target: Path, **values: Any) -> Path:
    """The model with another configuration."""
    target.mkdir()
    (target / "model.safetensors").hardlink_to(model / "model.safetensors")
    (target / "config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()) | values))
    return target


@pytest.fixture
def _bounded() -> Iterator[None]:
    tracemalloc.start()
    start = time.perf_counter()
    yield
    took, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took < LIMIT_S
    assert peak < LIMIT_BYTES


@pytest.mark.usefixtures("_bounded")
@pytest.mark.parametrize(("key", "value"), CASES, ids=lambda one: str(one)[:30])
def test_what_no_graph_is_made_of_is_one_line(
    bare: Backends, llama: Path, tmp_path: Path, key: str, value: Any
) -> None:
    with pytest.raises(ModelError) as caught:
        bare.inspect(Inspect(0, str(changed(llama, tmp_path / "model", **{key: value})), "float32"))
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < LINE


def test_a_list_of_kinds_that_repeats_for_ever_takes_no_time() -> None:
    neo = {"model_type": "gpt_neo", "hidden_size": 64, "num_heads": 2, "num_layers": 1000, "vocab_size": 9}
    start = time.perf_counter()
    describe(neo | {"attention_types": [[["global", "local"] * 10_000, 10**12]]})
    assert time.perf_counter() - start < LIMIT_S


def test_blocks_share_the_order_of_their_rows() -> None:
    neox = {"model_type": "gpt_neox", "hidden_size": 1 << 20, "num_attention_heads": 512, "vocab_size": 9}
    tracemalloc.start()
    describe(neox | {"num_hidden_layers": 50})  # of 24 MB each
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 << 20


def damaged(model: Path, target: Path, how: str, name: str) -> Path:
    """A copy of the model of which one tensor is damaged."""
    tensors = load_file(model / "model.safetensors")
    if how == "missing":
        del tensors[name]
    elif how == "shape":
        tensors[name] = np.ascontiguousarray(tensors[name][:-1])
    else:
        tensors[name] = tensors[name].astype(how)
    changed(model, target)
    (target / "model.safetensors").unlink()
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize("how", ["missing", "shape", "int8", "int64"])
@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.2.self_attn.k_proj.weight", "model.layers.2.self_attn.k_proj.bias",
     "model.layers.1.self_attn.o_proj.bias", "model.layers.0.mlp.down_proj.weight",
     "model.layers.3.input_layernorm.weight", "model.norm.weight", "lm_head.weight"],
)  # fmt: skip
def test_damaged_tensors_are_named(bare: Backends, llama: Path, tmp_path: Path, how: str, name: str) -> None:
    with pytest.raises(ModelError, match=name.removeprefix("model.").replace(".", r"\.")):
        bare.inspect(Inspect(0, str(damaged(llama, tmp_path / "model", how, name)), "float32"))


def test_files_that_change_after_they_were_read_are_named(bare: Backends, llama: Path, tmp_path: Path) -> None:
    path = damaged(llama, tmp_path / "model", "float32", "model.norm.weight")
    inspected = bare.inspect(Inspect(0, str(path), "float32"))
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    order = stage(inspected, 0, 5)
    with pytest.raises(ModelError, match=r"model\.safetensors ends in the middle of tensor"):
        bare.load(order, lambda done, total: None)
