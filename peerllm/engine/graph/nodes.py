"""Building a graph for onnxruntime: operators in the order they run, and weights that onnxruntime takes over."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnxruntime
from onnx import TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from peerllm.engine.weights.formats.coded_rows import CodedRows

CONTRIB = "com.microsoft"
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level for products of 8-bit numbers with exact sums
KINDS = {
    np.dtype("float32"): 1, np.dtype("uint8"): 2, np.dtype("int32"): 6, np.dtype("int64"): 7, np.dtype("float16"): 10,
}  # fmt: skip
OPSET, IR = 17, 8
INLINE_BYTES = 1024  # smaller weights are written into the model itself


def packed_zeros(numbers: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Numbers uint8 [rows, …] as MatMulNBits takes zero points: of 4 bits two in a byte, the first one lower."""
    if bits == 8:
        return np.ascontiguousarray(numbers)
    even = np.pad(numbers, ((0, 0), (0, numbers.shape[1] % 2)))
    return even[:, 0::2] | (even[:, 1::2] << np.uint8(4))


def make_pool(threads: int) -> None:
    """Set the thread count of all sessions of this process, before the first session; later calls change nothing."""
    with contextlib.suppress(Fail):  # the pool exists already
        onnxruntime.set_global_thread_pool_sizes(threads, 1)


class Graph:
    """The operators, inputs, outputs and weights of one session. Dimensions may be names."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: dict[str, Any] = {}
        self._outputs: list[Any] = []
        self._weights: dict[str, np.ndarray[Any, Any]] = {}
        self._sums: dict[tuple[str, int], str] = {}  # see block_sums
        self.made: dict[str, str] = {}  # results that several blocks use
        self._fresh = 0

    def input(self, name: str, *shape: int | str, dtype: Any = np.float32) -> str:
        """Declare an input. Idempotent for one name."""
        self._inputs.setdefault(name, helper.make_tensor_value_info(name, KINDS[np.dtype(dtype)], shape))
        return name

    def output(self, name: str, *shape: int | str, dtype: Any = np.float32) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, KINDS[np.dtype(dtype)], shape))

    def weight(self, array: np.ndarray[Any, Any]) -> str:
        """Add an array as a weight of the session."""
        name = self.fresh("w")
        self._weights[name] = np.ascontiguousarray(array)
        return name

    def shape(self, *sizes: int) -> str:
        """Add a constant list of whole numbers."""
        return self.weight(np.array(sizes, np.int64))

    def number(self, value: float) -> str:
        """Add a float32 constant."""
        return self.weight(np.array(value, np.float32))

    def add(self, kind: str, *inputs: str, domain: str = "", output: str = "", **attributes: Any) -> str:
        """Add an operator with one output; returns the output's name."""
        output = output or self.fresh(kind)
        self.node(kind, inputs, [output], domain, **attributes)
        return output

    def node(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any
    ) -> None:
        """Add an operator with the given output names; an input "" is omitted."""
        while not inputs[-1]:
            inputs = inputs[:-1]
        self._nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))

    def split(self, x: str, sizes: Sequence[int]) -> list[str]:
        """Split the last dimension into consecutive parts of these sizes."""
        names = [self.fresh("Split") for _ in sizes]
        self.node("Split", [x, self.shape(*sizes)], names, axis=-1)
        return names

    def coded_product(self, x: str, coded: CodedRows, bias: str = "") -> str:
        """Multiply x [..., columns] by a matrix without its minima: [..., rows]."""
        rows, blocks = coded.scales.shape
        inputs = [x, self.weight(coded.codes.reshape(rows, blocks, -1)), self.weight(coded.scales.reshape(-1))]
        inputs += ["" if coded.zeros is None else self.weight(packed_zeros(coded.zeros, coded.bits)), "", bias]
        return self.add(
            "MatMulNBits", *inputs, domain=CONTRIB, K=blocks * coded.block, N=rows, bits=coded.bits,
            block_size=coded.block, accuracy_level=INT8_ACTIVATIONS,
        )  # fmt: skip

    def block_sums(self, x: str, columns: int, block: int) -> str:
        """The sums of every `block` neighbours of x [b, n, columns]: [b, n, blocks], once for each x."""
        if (x, block) not in self._sums:
            apart = self.add("Reshape", x, self.shape(0, 0, columns // block, block))
            self._sums[x, block] = self.add("ReduceSum", apart, self.shape(-1), keepdims=0)
        return self._sums[x, block]

    def session(self) -> onnxruntime.InferenceSession:
        """Build the session. The session owns the weights from then on."""
        graph = helper.make_graph(self._nodes, "shard", list(self._inputs.values()), self._outputs)
        large = {name: array for name, array in self._weights.items() if array.nbytes > INLINE_BYTES}
        for name, array in self._weights.items():
            if name not in large:  # onnxruntime reads small constants, such as shapes, while it builds the session
                graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        for name, array in large.items():
            entry = graph.initializer.add(
                name=name, data_type=KINDS[array.dtype], dims=array.shape, data_location=TensorProto.EXTERNAL
            )
            entry.external_data.add(key="location", value="memory")  # handed over below, not a file
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR)
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False  # onnxruntime keeps a pattern for each input shape, which fragments the heap
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in large.values()]
        options.add_external_initializers(list(large), values)
        self._weights = {}
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def fresh(self, kind: str) -> str:
        """A name that no other operator or weight has."""
        self._fresh += 1
        return f"{kind} {self._fresh}"


class BoundSession:
    """A session bound by address to the memory that it reads and writes, so that nothing is copied.

    Arrays must be contiguous. This object keeps them alive; the memory behind a view must live as long as this object.
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._binding: Any = session.io_binding()
        self._kept: dict[str, Any] = {}

    def give(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Bind an input: every later run reads this array."""
        self._kept[name] = array
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def want(self, name: str, array: np.ndarray[Any, Any]) -> None:
        """Bind an output: every later run writes to this array."""
        self._kept[name] = array
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)
