"""The libraries that compute and download report nothing to their makers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SESSION = """
import peerllm.engine.graph.nodes as nodes
import onnxruntime
from onnx import TensorProto, helper
value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", value[:1], value[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
from huggingface_hub import constants
assert constants.HF_HUB_DISABLE_TELEMETRY
"""


def test_a_session_leaves_no_machine_id_and_no_record(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", SESSION], env=env, check=True, timeout=120)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
