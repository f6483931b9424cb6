"""Made-up weights of blocks that are alike differ, for onnxruntime keeps equal matrices of a graph once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROBE = """
import json, sys
import psutil
from peerllm.engine.backends import runtime_bytes
from peerllm.engine.graph.describe import describe
from peerllm.engine.graph.nodes import make_pool
from peerllm.engine.graph.graph_shard import make_span
from peerllm.engine.weights.tensors import MadeUp
from peerllm.engine.free_memory import return_memory

config = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "vocab_size": 9,
    "num_attention_heads": 8,
}
if len(sys.argv) > 2:
    names = [name for weights in describe(config).blocks for name, shape in weights.tensors() if len(shape) > 1]
    config["quantization_config"] = {"quant_method": "gguf", "types": dict.fromkeys(names, sys.argv[2])}
described = describe(config, kept=len(sys.argv) > 2)
tensors = MadeUp({name: shape for weights in described.blocks for name, shape in weights.tensors()})
bits, process = int(sys.argv[1]), psutil.Process()
make_pool(1)
runtime_bytes()
before = process.memory_info().rss
span = make_span(described.model, range(3), described.blocks, tensors, bits, 64)
return_memory()
weights = sum(block.nbytes(bits) for block in described.blocks)
print(json.dumps([process.memory_info().rss - before, weights]))
"""


@pytest.mark.parametrize("form", [("0",), ("8",), ("8", "Q4_K"), ("8", "Q6_K")])
def test_every_block_lies_in_memory(form: tuple[str, ...]) -> None:
    argv = [sys.executable, "-c", PROBE, *form]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120)
    taken, weights = json.loads(done.stdout)
    assert 0.9 * weights < taken
