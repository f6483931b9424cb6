"""onnxruntime's MatMulNBits on torch's memory: weights of 4 or 8 bits, activations rounded to 8 bits block by block.

One session holds one run of rows. Inputs and outputs are bound by address, nothing is copied but to float32 and back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from peerllm.engine.kernels.forms import block_of, packed_bytes
from peerllm.engine.kernels.rounding import rounded

INT8_ACTIVATIONS = 4  # the operator's accuracy_level: products of 8-bit numbers, sums exact
_pool = threading.Lock()
_pool_made = False


def maker(bits: int, threads: int) -> Callable[[Sequence[torch.Tensor]], NBits]:
    """Packs rows for products on `threads` threads; the first caller's number holds for the process."""
    global _pool_made  # noqa: PLW0603  # onnxruntime keeps one pool of threads for the process, made once
    import onnxruntime

    with _pool:
        if not _pool_made:
            onnxruntime.set_global_thread_pool_sizes(threads, 1)
            _pool_made = True
    return lambda rows: NBits(rows, bits)


class NBits:
    """Some rows of a matrix."""

    def __init__(self, rows: Sequence[torch.Tensor], bits: int) -> None:
        self.rows, self._columns = sum(map(len, rows)), rows[0].shape[1]
        block = block_of(self._columns)
        assert block is not None
        codes, scales = rounded(rows, bits, block)
        packed = codes.view(self.rows, self._columns // block, block * bits // 8)
        self.nbytes = packed_bytes(self.rows, self._columns, bits)
        self._session = _session(packed.numpy(), scales.numpy(), self.rows, self._columns, bits, block)
        self._binding: Any = self._session.io_binding()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, columns] to [n, rows]."""
        given = inputs.to(torch.float32).contiguous()
        out = torch.empty(len(given), self.rows)
        self._binding.bind_input("x", "cpu", 0, np.float32, given.shape, given.data_ptr())
        self._binding.bind_output("y", "cpu", 0, np.float32, out.shape, out.data_ptr())
        self._session.run_with_iobinding(self._binding)
        return out.to(inputs.dtype)


def _session(packed: Any, scales: Any, rows: int, columns: int, bits: int, block: int) -> Any:
    import onnxruntime
    from onnx import TensorProto, helper

    node = helper.make_node(
        "MatMulNBits",
        ["x", "weights", "scales"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=bits,
        block_size=block,
        accuracy_level=INT8_ACTIVATIONS,
    )
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", columns])
    wanted = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", rows])
    graph = helper.make_graph([node], "linear", [given], [wanted])
    held = {"weights": (packed, TensorProto.UINT8), "scales": (scales, TensorProto.FLOAT)}
    for name, (array, kind) in held.items():
        entry = graph.initializer.add(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        entry.external_data.add(key="location", value="memory")  # handed over below, never a file
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    options.add_external_initializers(
        list(held), [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array, _ in held.values()]
    )
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
