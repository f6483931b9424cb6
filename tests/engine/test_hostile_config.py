"""A config.json from another device, made to choose code or to take time and memory: refused before it can."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from peerllm.engine import assembly
from peerllm.engine.config import CODE_KEYS, MAX_COUNT, parse_config
from peerllm.engine.inspect import inspect_model
from peerllm.engine.shard import load_shard
from peerllm.errors import ModelError
from tests.engine.architectures import stage
from tests.engine.tiny import make_llama

LLAMA = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}


@pytest.mark.parametrize(
    "key", ["num_labels", "num_hidden_layers", "num_attention_heads", "num_experts", "n_routed_experts", "n_layer"]
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
