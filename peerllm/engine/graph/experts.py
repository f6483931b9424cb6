"""The experts of a block: their tensors, and how tokens are sent through them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from peerllm.engine.graph.matrix_product import Layout, require
from peerllm.engine.graph.nodes import CONTRIB, Graph
from peerllm.engine.graph.structure import Experts
from peerllm.engine.weights.formats.coded_rows import CodedRows, WeightForm
from peerllm.engine.weights.rounding import BLOCKS, rounded
from peerllm.engine.weights.tensors import Floats, Tensors

LAYERS: tuple[Literal[0], Literal[1]] = (0, 1)  # gate and up together, and down
Layer = Literal[0, 1]


@dataclass(frozen=True, slots=True)
class Stacks:
    """The tensors of a block's experts: one for each expert ("mlp.experts.{}.gate_proj"), or stacks `up` and `down`."""

    gate: str
    up: str
    down: str
    # "halves": `up` is [experts, 2I, H], first all of gate, then all of up; `down` is [experts, H, I].
    # "interleaved": `up` is [experts, H, 2I], gate and up alternating; `down` is [experts, I, H]; both have biases.
    # "apart": `gate` and `up` are [experts, I, H], `down` is [experts, H, I]; all have biases, or none has.
    form: Literal["each", "interleaved", "halves", "apart"] = "each"
    forms: tuple[WeightForm | None, ...] = (None, None, None)  # how gate, up and down are stored ("apart" alone)
    kept: bool = False  # see Part

    def layout(self, experts: Experts, hidden: int, bits: int) -> Layout:
        """How all matrices are held: one operator takes all in so many bits and in blocks of one size."""
        kept = [form for form in self.forms if self.kept and bits and form is not None and form.bits]
        exact = [form for form in kept if not form.minima]
        alike = len(exact) == len(self.forms) and not any(form.zeros for form in exact)
        block = min((form.block for form in kept), default=BLOCKS[0])
        fitting = (size for size in (*BLOCKS, 16) if size <= block and not hidden % size and not experts.wide % size)
        found = next(fitting, None)
        if not bits or found is None or (not kept and found not in BLOCKS):
            return Layout(0)
        return Layout(max(form.bits for form in exact) if alike else 8 if kept else bits, found)

    def nbytes(self, experts: Experts, hidden: int, bits: int) -> int:
        return self.layout(experts, hidden, bits).nbytes(3 * experts.count * experts.wide, hidden)

    def tensors(self, experts: Experts, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the experts' tensors."""
        count, wide = experts.count, experts.wide
        if self.form == "interleaved":
            yield self.up, (count, hidden, 2 * wide)
            yield f"{self.up}_bias", (count, 2 * wide)
            yield self.down, (count, wide, hidden)
            yield f"{self.down}_bias", (count, hidden)
        elif self.form == "halves":
            yield self.up, (count, 2 * wide, hidden)
            yield self.down, (count, hidden, wide)
        elif self.form == "apart":
            yield f"{self.gate}.weight", (count, wide, hidden)
            yield f"{self.up}.weight", (count, wide, hidden)
            yield f"{self.down}.weight", (count, hidden, wide)
        else:
            for number in range(count):
                yield f"{self.gate.format(number)}.weight", (wide, hidden)
                yield f"{self.up.format(number)}.weight", (wide, hidden)
                yield f"{self.down.format(number)}.weight", (hidden, wide)

    def coded_tensors(self) -> Iterator[str]:
        """The names of the tensors that are stored in a form."""
        for name, form in zip((self.gate, self.up, self.down), self.forms, strict=True):
            if form is not None:
                yield f"{name}.weight"

    def floats(self, tensors: Tensors, experts: Experts, hidden: int, number: int, layer: Layer) -> Floats:
        """A layer of one expert: gate and up, rows alternating, [2I, H], or down [H, I]."""
        wide = experts.wide
        if self.form == "interleaved":
            return np.ascontiguousarray(tensors.floats((self.up, self.down)[layer], number).T)
        if self.form == "halves":
            made = tensors.floats((self.up, self.down)[layer], number)
            return made if layer else _alternating(*made.reshape(2, wide, hidden))
        sizes = [(wide, hidden), (wide, hidden), (hidden, wide)]
        read = []
        for name, form, (rows, columns) in zip((self.gate, self.up, self.down), self.forms, sizes, strict=True):
            if (name == self.down) != bool(layer):
                continue
            if form is not None:
                some = slice(number * rows, (number + 1) * rows)
                read.append(tensors.decoded(form, f"{name}.weight", some, rows, columns))
            elif self.form == "apart":
                read.append(tensors.floats(f"{name}.weight", number))
            else:
                read.append(tensors.floats(f"{name.format(number)}.weight", slice(None)))
        return read[0] if layer else _alternating(*read)

    def coded(
        self, tensors: Tensors, experts: Experts, hidden: int, number: int, layer: Layer, layout: Layout
    ) -> tuple[np.ndarray[Any, Any], Floats]:
        """Codes and scales of a layer of one expert, its rows as in `floats`; what has minima is rounded."""
        wide, names = experts.wide, (self.gate, self.up, self.down)
        rows, columns = (hidden, wide) if layer else (wide, hidden)
        mine = (2,) if layer else (0, 1)
        forms = [self.forms[one] for one in mine]
        if not self.kept or any(form is None or not form.bits or form.minima for form in forms):
            return rounded(self.floats(tensors, experts, hidden, number, layer), layout.bits, layout.block)
        some, read = slice(number * rows, (number + 1) * rows), []
        for one, form in zip(mine, forms, strict=True):
            assert form is not None
            made = tensors.coded(form, f"{names[one]}.weight", some, rows, columns)
            read.append(widened(made, layout))
        if layer:
            return read[0]
        return _alternating(read[0][0], read[1][0]), _alternating(read[0][1], read[1][1])

    def bias(self, tensors: Tensors, layer: Layer) -> Floats | None:
        """The biases of all experts' layers, [experts, rows]; None if there are none."""
        if self.form == "interleaved":
            return tensors.floats(f"{(self.up, self.down)[layer]}_bias", slice(None))
        if self.form != "apart" or tensors.shape(f"{self.down}.bias") is None:
            return None
        if layer:
            return tensors.floats(f"{self.down}.bias", slice(None))
        both = [tensors.floats(f"{name}.bias", slice(None)) for name in (self.gate, self.up)]
        return np.stack(both, axis=2).reshape(len(both[0]), -1)


def _alternating(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The rows of two matrices in turns."""
    return np.stack((first, second), axis=1).reshape(2 * len(first), -1)


def widened(coded: CodedRows, layout: Layout) -> tuple[np.ndarray[Any, Any], Floats]:
    """Codes and scales of the same weights in a layout without zeros, of no fewer bits and no larger blocks."""
    codes = coded.codes
    scales = np.repeat(coded.scales, coded.block // layout.block, axis=1)
    if coded.bits == layout.bits and coded.zeros is None:
        return codes, scales
    if coded.bits == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=2).reshape(len(codes), -1)
    zeros: Any = 1 << (coded.bits - 1) if coded.zeros is None else np.repeat(coded.zeros, coded.block, axis=1)
    return (codes + np.uint8(1 << (layout.bits - 1))) - np.asarray(zeros, np.uint8), scales


def add_experts(
    graph: Graph, rows: str, scores: str, experts: Experts, stacks: Stacks, hidden: int, tensors: Tensors, bits: int
) -> str:
    """Send rows [n, H] through the experts that scores [n, experts] choose; only those experts are computed."""
    for name, shape in stacks.tensors(experts, hidden):
        require(tensors, name, shape)
    layout = stacks.layout(experts, hidden, bits)
    inputs = [rows, scores]
    for layer in LAYERS:
        count, columns = (hidden, experts.wide) if layer else (2 * experts.wide, hidden)
        if not layout.bits:
            stack = np.empty((experts.count, count, columns), np.float32)
            for number in range(experts.count):
                stack[number] = stacks.floats(tensors, experts, hidden, number, layer)
            inputs.append(graph.weight(stack))
        else:
            codes = np.empty((experts.count, count, columns * layout.bits // 8), np.uint8)
            scales = np.empty((experts.count, count, columns // layout.block), np.float32)
            for number in range(experts.count):
                codes[number], scales[number] = stacks.coded(tensors, experts, hidden, number, layer, layout)
            inputs += [graph.weight(codes), graph.weight(scales)]
        bias = stacks.bias(tensors, layer)
        inputs.append("" if bias is None else graph.weight(bias))
    about: dict[str, Any] = {
        "k": experts.used, "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": experts.alpha,
        "activation_beta": experts.beta, "normalize_routing_weights": int(experts.normalised),
    }  # fmt: skip
    if experts.limit:
        about["swiglu_limit"] = experts.limit
    if not layout.bits:
        return graph.add("MoE", *inputs, domain=CONTRIB, **about)
    return graph.add("QMoE", *inputs, domain=CONTRIB, expert_weight_bits=layout.bits, block_size=layout.block, **about)
