"""onnxruntime's product with rounded weights; inputs are rounded to 8 bits within, block by block."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

INT8_INPUTS = 4  # accuracy_level: products of 8-bit numbers, sums exact
CONTRIB = "com.microsoft"


class NBits:
    """Some rows of a matrix, as `rounding.rounded` made them."""

    def __init__(self, codes: NDArray[np.uint8], scales: NDArray[np.float32], bits: int) -> None:
        self._session = _session(codes, scales, bits)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, columns] to [n, rows], in the inputs' dtype."""
        (out,) = self._session.run(None, {"x": inputs.to(torch.float32).contiguous().numpy()})
        return torch.from_numpy(out).to(inputs.dtype)


def _session(codes: NDArray[np.uint8], scales: NDArray[np.float32], bits: int) -> Any:
    """The weights are handed over as they lie in memory: they are in no file, and never twice in memory."""
    import onnxruntime
    from onnx import TensorProto, helper

    rows, blocks = scales.shape
    columns = codes.shape[1] * 8 // bits
    shape = {"K": columns, "N": rows, "bits": bits, "block_size": columns // blocks}
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain=CONTRIB, accuracy_level=INT8_INPUTS, **shape
    )
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])
        for name, width in (("x", columns), ("y", rows))
    )
    graph = helper.make_graph([node], "peerllm", [x], [y])
    held: dict[str, NDArray[Any]] = {"codes": codes.reshape(rows, blocks, -1), "scales": scales}
    for name, kind in (("codes", TensorProto.UINT8), ("scales", TensorProto.FLOAT)):
        entry = graph.initializer.add(
            name=name, data_type=kind, dims=held[name].shape, data_location=TensorProto.EXTERNAL
        )
        entry.external_data.add(key="location", value="memory")  # handed over below, never a file
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.add_external_initializers(
        list(held), [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in held.values()]
    )
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
