"""config.json of real GGUF files says what transformers reads from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peerllm.daemon.weights.gguf.header import read_gguf
from peerllm.daemon.weights.gguf.model_directory import model_directory
from peerllm.engine.graph.describe import describe
from peerllm.engine.weights.checkpoint import read_tensors
from tests.lab.real_gguf import FILES, real_gguf

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]
OURS = {"quantization_config", "layer_types", "rope_local_base_freq", "rope_theta", "rope_scaling"}


@pytest.fixture(scope="module", params=sorted(FILES))
def file(request: pytest.FixtureRequest) -> Path:
    return real_gguf(request.param)


def test_it_describes_the_model_that_transformers_reads(file: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    theirs: dict[str, Any] = AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_dict()
    config = json.loads((model_directory([file], tmp_path) / "config.json").read_text())
    different = {key: (config[key], theirs.get(key)) for key in config.keys() - OURS if config[key] != theirs.get(key)}
    assert not different
    stored = {**theirs, "quantization_config": config["quantization_config"]}
    assert describe(config).model == describe(stored).model


def test_every_tensor_has_its_place(file: Path, tmp_path: Path) -> None:
    import gguf

    tensors = read_tensors(model_directory([file], tmp_path))
    theirs = {(int(one.data_offset), int(one.n_bytes), one.tensor_type.name) for one in gguf.GGUFReader(file).tensors}
    assert {(one.offset, one.nbytes, one.dtype) for one in tensors.values()} == theirs
    assert len(tensors) == len(read_gguf(file).tensors)
