"""Small graphs for onnxruntime, on memory that is handed over: weights are never in a file, nor twice in memory."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level: products of 8-bit numbers, sums exact
CONTRIB = "com.microsoft"
BATCH, TOKENS = 1, "n"
_pool = threading.Lock()
_pool_made = False
NUMBERS = {np.dtype("float32"): 1, np.dtype("uint8"): 2, np.dtype("int64"): 7}  # onnx.TensorProto's ...
NARROW = {torch.float16: 10, torch.bfloat16: 16}


def make_pool(threads: int) -> None:
    """The threads of every session; before the first. The first caller's number holds for the process."""
    global _pool_made  # noqa: PLW0603  # onnxruntime keeps one pool for the process, made once
    import onnxruntime

    with _pool:
        if not _pool_made:
            onnxruntime.set_global_thread_pool_sizes(threads, 1)
            _pool_made = True


class Graph:
    """Operators in the order they run. Given and wanted are float32 unless said otherwise."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._given: list[Any] = []
        self._wanted: list[Any] = []
        self._held: dict[str, Any] = {}

    def given(self, name: str, *shape: int | str, number: type = np.float32) -> str:
        """An input; dimensions by name are told when it runs."""
        self._given.append(_value(name, number, shape))
        return name

    def wanted(self, name: str, *shape: int | str) -> None:
        self._wanted.append(_value(name, np.float32, shape))

    def held(self, name: str, array: Any) -> str:
        """A numpy array that stays with the graph."""
        self._held[name] = array
        return name

    def constant(self, name: str, value: float | Sequence[int]) -> str:
        """A number in float32, or a shape."""
        from onnx import helper

        about: dict[str, Any] = {"value_float": value} if isinstance(value, float) else {"value_ints": list(value)}
        self._nodes.append(helper.make_node("Constant", [], [name], **about))
        return name

    def add(self, kind: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> str:
        """An operator's only output."""
        from onnx import helper

        self._nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **attributes))
        return output

    def rounded(self, given: str, dtype: torch.dtype, output: str) -> str:
        """The nearest numbers that `dtype` can say, in float32 still."""
        if dtype is torch.float32:
            return self.add("Identity", [given], output)
        narrow = self.add("Cast", [given], f"{output} in {dtype}", to=NARROW[dtype])
        return self.add("Cast", [narrow], output, to=NUMBERS[np.dtype("float32")])

    def split(self, given: str, sizes: Mapping[str, int]) -> dict[str, str]:
        """Runs of the last dimension, one after the other, by name."""
        from onnx import helper

        outputs = {name: f"{name} of {given}" for name in sizes}
        lengths = self.constant(f"sizes of {given}", list(sizes.values()))
        self._nodes.append(helper.make_node("Split", [given, lengths], list(outputs.values()), axis=-1))
        return outputs

    def rounded_product(self, x: str, output: str, codes: torch.Tensor, scales: torch.Tensor, bits: int) -> str:
        """`x` times the rows whose codes and scales `rounding.rounded` made."""
        rows, blocks = scales.shape
        columns = codes.shape[1] * 8 // bits
        held = [
            self.held(f"{output} codes", codes.view(rows, blocks, -1).numpy()),
            self.held(f"{output} scales", scales.numpy()),
        ]
        shape = {"K": columns, "N": rows, "bits": bits, "block_size": columns // blocks}
        return self.add("MatMulNBits", [x, *held], output, CONTRIB, **shape, accuracy_level=INT8_ACTIVATIONS)

    def session(self) -> Any:
        """onnxruntime's session; what was held is its from now on."""
        import onnxruntime
        from onnx import TensorProto, helper

        graph = helper.make_graph(self._nodes, "peerllm", self._given, self._wanted)
        for name, array in self._held.items():
            kind = NUMBERS[array.dtype]
            entry = graph.initializer.add(
                name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL
            )
            entry.external_data.add(key="location", value="memory")  # handed over below, never a file
        domains = [helper.make_opsetid("", 17), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=domains, ir_version=8)
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = False
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self._held.values()]
        options.add_external_initializers(list(self._held), values)
        self._held = {}
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


class Bound:
    """A session and the memory it reads and writes, bound by address: nothing is copied. Tensors are contiguous."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._binding: Any = session.io_binding()

    def give(self, name: str, tensor: torch.Tensor) -> None:
        """Read at every run from now on; it must live as long."""
        number = np.int64 if tensor.dtype is torch.int64 else np.float32
        self._binding.bind_input(name, "cpu", 0, number, tensor.shape, tensor.data_ptr())

    def want(self, name: str, tensor: torch.Tensor) -> None:
        """Written at every run from now on; it must live as long."""
        self._binding.bind_output(name, "cpu", 0, np.float32, tensor.shape, tensor.data_ptr())

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)


def _value(name: str, number: type, shape: Sequence[int | str]) -> Any:
    from onnx import helper

    return helper.make_tensor_value_info(name, NUMBERS[np.dtype(number)], shape)
