"""What a shard takes: its own bytes in the dtype it computes in, and little more, whatever the file holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.architectures import EXPERTS, quiet

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
LIMIT = 1.15
BUFFERS_BYTES = 4 << 20  # rows that are read and rounded at once, and what each graph takes beside its weights


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of one model of about 80 million numbers, in each dtype; and one with experts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet()
    root = tmp_path_factory.mktemp("models")
    common = dict(
        hidden_size=1024, num_attention_heads=8, num_key_value_heads=8, num_hidden_layers=4, max_position_embeddings=64,
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    tied = AutoConfig.for_model("llama", vocab_size=30000, intermediate_size=2816, tie_word_embeddings=True, **common)
    experts = {**EXPERTS, "num_experts": 8, "num_local_experts": 8}
    sparse = AutoConfig.for_model("mixtral", vocab_size=1000, intermediate_size=256, **common, **experts)
    for name, config in (("tied", tied), ("experts", sparse)):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for held, dtype in DTYPES.items():
            if name == "tied" or held == "BF16":
                model.to(dtype).save_pretrained(root / f"{name}-{held}")
                model.to(torch.float32)
    return root


CASES = [  # of which the graph engine computes all but those by torch; by default those of EVER
    ("tied-F16", "float32", "none", ["0-5"]),
    ("tied-F32", "auto", "auto", ["1-5"]),
    ("tied-BF16", "auto", "auto", ["0-5"]),  # int8
    ("tied-BF16", "auto", "int4", ["0-5"]),
    ("tied-F32", "float32", "int8", ["2-5"]),
    ("tied-F16", "float32", "none", ["0-1", "5-5"]),
    ("experts-BF16", "float32", "none", ["1-3"]),
    ("experts-BF16", "auto", "int4", ["1-4"]),
    ("tied-BF16", "bfloat16", "none", ["0-5"]),  # by torch
    ("tied-F32", "bfloat16", "none", ["1-5"]),
]
EVER = (2, 5, 7, 8)


@pytest.mark.parametrize(
    ("model", "dtype", "quantize", "ranges"),
    [pytest.param(*case, marks=() if number in EVER else pytest.mark.slow) for number, case in enumerate(CASES)],
    ids=str,
)
def test_anonymous_memory_stays_within_the_shards_own_bytes(models, model, dtype, quantize, ranges):
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.memory_probe", str(models / model), dtype, quantize, *ranges],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(f"{model} {dtype} {quantize}", {name: f"{nbytes / 1e6:.1f} MB" for name, nbytes in told.items()})
    assert told["weights"] > 15e6
    assert told["peak"] <= LIMIT * told["weights"] + told["runtime"] + told["loading"] + BUFFERS_BYTES, told
    assert told["after"] <= LIMIT * told["weights"] + told["runtime"] + BUFFERS_BYTES, told


def test_head_and_embedding_share_one_matrix(models: Path):
    """Of two shards of one process, and counted once by the model's profile."""
    from peerllm.engine.model.torch_inspect import inspect_model
    from peerllm.engine.model.torch_shard import load_shard
    from tests.engine.architectures import stage

    inspection = inspect_model(models / "tied-F32")
    layers = inspection.profile.layers
    assert layers[-1].tied_to == 0
    assert layers[0].memory_bytes == 30000 * 1024 * 4
    source, back = (load_shard(stage(inspection, number, number)) for number in (0, 5))
    embedding = source._model.get_input_embeddings().weight
    assert back._model.get_output_embeddings().weight.data_ptr() == embedding.data_ptr()
